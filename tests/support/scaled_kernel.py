"""A small Mosaic GPU kernel that reads quantized weights as they are stored: only to see which layouts reach it."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS, BLOCK = 64, 128


def scaled_matmul(lhs, rhs):
    """`lhs [64, K]` e4m3 times every expert of `rhs [E, N, K]` (fp8 per block or per channel) -> `[E, 64, N]` f32."""
    e, n, k = rhs.shape
    per_channel = rhs.format.block[0] == 1
    tiled = (plgpu.TilingTransform((8, BLOCK)), plgpu.SwizzleTransform(BLOCK))
    layout = plgpu.Layout.WGMMA

    def kernel(lhs_gmem, values_gmem, scales_gmem, out_gmem, out_smem):
        expert, ni = lax.axis_index("expert"), lax.axis_index("n")

        def k_step(index, lhs_smem, rhs_smem, acc):
            def block_sum(part):
                plgpu.wgmma(part, lhs_smem, rhs_smem.transpose((1, 0)))
                return part[...]

            scale = jnp.float32(1) if per_channel else scales_gmem[expert, index[0], ni]
            return acc + pl.run_scoped(block_sum, plgpu.ACC((ROWS, BLOCK))) * scale

        acc = plgpu.emit_pipeline(
            k_step,
            grid=(k // BLOCK,),
            in_specs=[
                plgpu.BlockSpec((ROWS, BLOCK), lambda ki: (0, ki), transforms=tiled),
                plgpu.BlockSpec((BLOCK, BLOCK), lambda ki: (ni, ki), transforms=tiled),
            ],
            max_concurrent_steps=4,
            init_carry=plgpu.layout_cast(jnp.zeros((ROWS, BLOCK), jnp.float32), layout),
        )(lhs_gmem, values_gmem.at[expert])
        if per_channel:
            columns = scales_gmem.at[expert, 0, pl.ds(ni * BLOCK, BLOCK)]
            scale = plgpu.load(columns, layout=layout.reduce(0), optimized=False)
            acc = acc * lax.broadcast_in_dim(scale, acc.shape, (1,))
        out_smem[...] = acc
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[expert, :, pl.ds(ni * BLOCK, BLOCK)])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((e, ROWS, n), jnp.float32),
        grid=(e, n // BLOCK),
        grid_names=("expert", "n"),
        scratch_types=[plgpu.SMEM((ROWS, BLOCK), jnp.float32)],
        kernel_name="scaled_matmul",
    )(lhs, rhs.values, rhs.scales)
