"""`python -m tests.ptxsim.mutants --json F`: runs all mutants; exit status 1 if one survives."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # tests/, where the kernels' test cases lie

from ptxsim.mutants.framework import judge
from ptxsim.mutants.subjects import subjects


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ptxsim.mutants", description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write {total, caught, survivors}")
    parser.add_argument("--only", default="", help="mutants whose 'subject: name' contains this")
    options = parser.parse_args()
    verdicts = []
    for subject in subjects():
        chosen = [m for m in subject.mutants if options.only in f"{subject.name}: {m.name}"]
        for verdict in judge(subject, chosen) if chosen else ():
            print(verdict, flush=True)
            verdicts.append(verdict)
    survivors = [f"{v.subject}: {v.mutant.name}" for v in verdicts if not v.caught]
    summary = {"total": len(verdicts), "caught": len(verdicts) - len(survivors), "survivors": survivors}
    print(json.dumps(summary))
    if options.json:
        found = {f"{v.subject}: {v.mutant.name}": v.found for v in verdicts}
        options.json.write_text(json.dumps(summary | {"found": found}, indent=1) + "\n")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
