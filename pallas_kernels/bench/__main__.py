"""The command: `python -m pallas_kernels.bench grouped_matmul`, `... quantize`, `... fused_moe`,
`... table FILE.jsonl` for what they wrote, and `... tune` for the tiles of Hopper's kernels."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pallas_kernels.bench import cases, opponents, table


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it; returns the exit status: 1 where no row has a time, 2 for arguments that mean nothing."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command == "table":
        print(table.markdown(table.read(args.file), opponents.read(args.opponents)))
        return 0
    try:
        return int(args.bench(args))
    except ValueError as error:
        parser.error(str(error))


def _grouped_matmul(args: argparse.Namespace) -> int:
    from pallas_kernels.bench import peers

    names = {"default": cases.DEFAULT, "all": cases.ALL}.get(args.cases) or args.cases.split(",")
    chosen = cases.select(names, _integers(args.tokens), routing=args.routing, seed=args.seed)
    configs, peer_names = read_configs(args.configs), peers.choose(args.peers, peers.EVERYTHING)
    cases.refuse_unknown({"peers": (peer_names, peers.EVERYTHING)})
    if peers.TORCH in peer_names:  # jax, not started yet, would take the memory that torch needs
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

    def bench(log: Callable[[str], None]) -> Any:
        from pallas_kernels.bench.grouped_matmul import Bench

        return Bench(configs, peer_names, log=log, commit=args.commit)

    return _run(chosen, bench, f"{len(chosen)} cases, {len(configs)} configs", args)


def _quantize(args: argparse.Namespace) -> int:
    from pallas_kernels.bench import peers, quantize

    models, formats = args.models.split(","), peers.choose(args.formats, quantize.WEIGHT_FORMATS)
    peer_names = peers.choose(args.peers, quantize.PEERS)
    cases.refuse_unknown({"models": (models, cases.MODELS), "peers": (peer_names, quantize.PEERS)})
    chosen = quantize.select(models, formats)

    def bench(log: Callable[[str], None]) -> Any:
        return quantize.QuantizeBench(peer_names, log=log, commit=args.commit)

    return _run(chosen, bench, f"{len(chosen)} cases", args)


def _fused_moe(args: argparse.Namespace) -> int:
    from pallas_kernels.bench import layer, layer_peers, peers

    models, schemes = args.models.split(","), peers.choose(args.schemes, layer.SCHEMES)
    peer_names = peers.choose(args.peers, layer_peers.EVERYTHING)
    cases.refuse_unknown(
        {
            "models": (models, cases.MODELS),
            "schemes": (schemes, layer.SCHEMES),
            "peers": (peer_names, layer_peers.EVERYTHING),
        }
    )
    chosen = layer.select(models, schemes, _integers(args.tokens), routing=args.routing, seed=args.seed)

    def bench(log: Callable[[str], None]) -> Any:
        from pallas_kernels.bench.fused_moe import LayerBench

        return LayerBench(peer_names, xla_seconds=args.xla_seconds, log=log, commit=args.commit)

    return _run(chosen, bench, f"{len(chosen)} cases", args)


def _tune(args: argparse.Namespace) -> int:
    from pallas_kernels.bench import layer, peers
    from pallas_kernels.bench.tuner import Tuner

    models, schemes = args.models.split(","), peers.choose(args.schemes, layer.SCHEMES)
    cases.refuse_unknown({"models": (models, cases.MODELS), "schemes": (schemes, layer.SCHEMES)})
    chosen = layer.select(models, schemes, _integers(args.tokens), routing=args.routing, seed=args.seed)
    log = _logger()
    done = Tuner(args.out, limit_s=args.limit_s, log=log).run(chosen)
    log(f"done: {done} of {len(chosen)} cells, {args.out}")
    return 0 if done else 1


def _logger() -> Callable[[str], None]:
    start = time.monotonic()

    def log(line: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {line}", file=sys.stderr, flush=True)

    return log


def _run(
    chosen: Sequence[Any], bench: Callable[[Callable[[str], None]], Any], what: str, args: argparse.Namespace
) -> int:
    import jax

    any_time, log = False, _logger()
    device = jax.devices()[0]
    log(f"{what}, on {device.device_kind} (jax {jax.__version__})")
    if device.platform == "cpu":
        log("NO ACCELERATOR: times are the host's clock on a CPU, say nothing of a device, and stand in `wall_us` only")
    with args.out.open("a") as out:
        for rows in bench(log).run(chosen):
            for row in rows:
                any_time = any_time or row.best
                out.write(row.to_json() + "\n")
            out.flush()
    log(f"done: {args.out}")
    print(table.markdown(table.read(args.out), opponents.read()))
    return 0 if any_time else 1


def read_configs(text: str | None) -> list[dict[str, Any] | None]:
    """A JSON list of configs, given as it is or as the path of a file; null stands for the heuristic's choice.

    Raises:
      ValueError: anything else.
    """
    if text is None:
        return [None]
    configs = json.loads(text if text.lstrip().startswith("[") else Path(text).read_text())
    if not isinstance(configs, list) or not configs or not all(c is None or isinstance(c, dict) for c in configs):
        raise ValueError(f"--configs must be a JSON list of objects or null, not {text}")
    return configs


def _integers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise ValueError(f"--tokens {text} must be positive")
    return numbers


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    run = commands.add_parser("grouped_matmul", help="measure it beside its peers")
    run.add_argument("--cases", default="default", help="default, all, or names with commas: mixtral, mixtral_w2, ...")
    run.add_argument("--configs", help="JSON list of kernel configs, or a file of it; null is the heuristic's choice")
    run.set_defaults(bench=_grouped_matmul)
    into = commands.add_parser("quantize", help="measure the quantization of whole leaves")
    into.add_argument("--formats", default="all", help="all, or names of weight formats with commas")
    into.set_defaults(bench=_quantize)
    layer = commands.add_parser("fused_moe", help="measure a whole routed FFN beside its peers and published opponents")
    layer.add_argument("--schemes", default="all", help="all, or names with commas: bf16, fp8_block128, ...")
    layer.add_argument("--xla-seconds", type=float, default=0.2, help="what a call of the peer xla may take")
    layer.set_defaults(bench=_fused_moe)
    tuner = commands.add_parser("tune", help="search tiles for the matmuls of a routed FFN, on a Hopper GPU")
    tuner.add_argument("--schemes", default="all", help="all, or names with commas: bf16, fp8_block128, ...")
    tuner.add_argument("--limit-s", type=float, default=540, help="seconds for all that was asked for")
    tuner.add_argument("--out", type=Path, required=True, help="JSON table; entries of other matmuls stay")
    tuner.set_defaults(bench=_tune)
    for each, models in ((into, "mixtral"), (layer, "qwen3-30b,mixtral,dsv3-tp8"), (tuner, "qwen3-30b")):
        each.add_argument("--models", default=models, help="names with commas: " + ", ".join(cases.MODELS))
    for each, tokens in ((run, "64,512,4096"), (layer, "16,64,512,4096,16384"), (tuner, "16,64,512,4096,16384")):
        each.add_argument("--tokens", default=tokens, help="batch sizes of the models")
        each.add_argument("--routing", default="uniform", choices=cases.ROUTINGS, help="how tokens choose experts")
        each.add_argument("--seed", type=int, default=0, help="of routing and data")
    for each in (run, into, layer):
        each.add_argument("--peers", default="all", help="all, none, or names with commas")
        each.add_argument("--commit", help="for the rows, where this is no git checkout")
        each.add_argument("--out", type=Path, required=True, help="JSON lines; rows are appended")
    show = commands.add_parser("table", help="print rows as markdown")
    show.add_argument("file", type=Path)
    show.add_argument("--opponents", type=Path, default=opponents.H200, help="JSON; for rows of fused_moe")
    return parser


if __name__ == "__main__":
    sys.exit(main())
