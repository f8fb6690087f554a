"""A roofline from the rows that `diaphane bench --csv` wrote, all of them or some.

python benchmarks/roofline.py rows.csv roofline.png --kernel source_attention
"""

import argparse
import csv
from pathlib import Path

from diaphane.cli.roofline import drawn, points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--kernel", nargs="+", help="which kernels (default: all)")
    parser.add_argument("--case", nargs="+", help="which cases (default: all)")
    args = parser.parse_args()
    with args.csv.open(newline="") as text:
        rows = [
            row
            for row in csv.DictReader(text)
            if (not args.kernel or row["kernel"] in args.kernel) and (not args.case or row["case"] in args.case)
        ]
    if not points(rows):
        raise SystemExit(f"{args.csv}: no row of those kernels and cases was timed")
    args.picture.write_bytes(drawn(rows, args.picture.suffix[1:] or "png"))
    print(f"wrote {args.picture}")


if __name__ == "__main__":
    main()
