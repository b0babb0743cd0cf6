"""Reads pytest's junit files for `.ci/run`: what ran, what was skipped and why. Standard library only."""

import ast
import collections
import dataclasses
import pathlib
import sys
import xml.etree.ElementTree as ET


@dataclasses.dataclass
class Counts:
    """Tests by outcome; a test with an error in its setup or teardown has failed."""

    passed: int = 0
    failed: int = 0
    reasons: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @property
    def skipped(self) -> int:
        """Skipped tests and expected failures."""
        return self.reasons.total()

    def add(self, other: "Counts") -> None:
        """Adds the counts of another report."""
        self.passed += other.passed
        self.failed += other.failed
        self.reasons += other.reasons

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def read(report: pathlib.Path) -> Counts:
    """Counts of one junit file; a test that failed and then broke in its teardown has two entries there."""
    outcomes: dict[tuple[str, str], str] = {}
    counts = Counts()
    for case in ET.parse(report).getroot().iter("testcase"):
        test = (case.get("classname", ""), case.get("name", ""))
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            outcomes[test] = "failed"
        elif skip is None:
            outcomes.setdefault(test, "passed")
        else:
            message = skip.get("message") or ""
            if message == "collection skipped":  # of a whole module; its text is a tuple (path, line, reason)
                message = ast.literal_eval(skip.text or "")[2]
            if skip.get("type") == "pytest.xfail":
                message = f"expected failure: {message}"
            counts.reasons[message.removeprefix("Skipped: ")] += 1
    for outcome in outcomes.values():
        counts.passed += outcome == "passed"
        counts.failed += outcome == "failed"
    return counts


def check_ran(kind: str, report: pathlib.Path, lacking: list[str]) -> int:
    """Fails unless tests of this kind ran and none was skipped for a reason that has one of these words."""
    if not report.exists():
        print(f"{kind}: pytest wrote no report")
        return 1
    counts = read(report)
    skipped = [reason for reason in counts.reasons if any(word in reason for word in lacking)]
    print(f"{kind} tests executed: {counts.passed + counts.failed}")
    if skipped or not counts.passed + counts.failed:
        print(f"{kind} tests did not run:", "; ".join(skipped) or f"no test is marked `{kind}`")
        return 1
    return 0


def summarize(jobs: pathlib.Path, reports: pathlib.Path) -> int:
    """Prints one line for each job, each reason to skip, and the totals; 1 unless all went well and tests ran."""
    total, ok = Counts(), True
    print(f"\n===== summary =====\n{'job':<22}{'seconds':>8}  {'result':<8}tests")
    for line in jobs.read_text().splitlines():
        job, seconds, result = line.split("\t")
        counts = Counts()
        for report in sorted(reports.glob(f"{job}.*.xml")):
            counts.add(read(report))
        ran = counts.passed or counts.failed or counts.skipped
        print(f"{job:<22}{seconds:>8}  {result:<8}{counts if ran else ''}".rstrip())
        total.add(counts)
        ok = ok and result == "passed"
    print(f"\nskipped, by reason ({total.skipped}):" if total.skipped else "\nno test was skipped")
    for reason, count in total.reasons.most_common():
        print(f"{count:>6} x {reason}")
    if not total.passed + total.failed:
        print("no test ran")
        ok = False
    print(f"\n{'all jobs passed' if ok and not total.failed else 'FAILED'}\n{total}")
    return 0 if ok and not total.failed else 1


if __name__ == "__main__":
    command, first, second, *words = sys.argv[1:]
    if command == "ran":
        sys.exit(check_ran(first, pathlib.Path(second), words))
    sys.exit(summarize(pathlib.Path(first), pathlib.Path(second)))
