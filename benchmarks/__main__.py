"""`python -m benchmarks`: the results on file as one table."""

import json

from benchmarks.common import RESULTS, line


def main():
    for path in sorted(RESULTS.glob("*.json")):
        found = json.loads(path.read_text())
        for claim in found["claims"]:
            print(line(path.stem, claim))
        print(f"       {path.stem}: {found['machine']}; commit {found['commit'][:12]}, {found['date']}")


if __name__ == "__main__":
    main()
