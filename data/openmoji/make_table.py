"""Make openmoji.csv.gz, the metadata table, from the npm package: `npm pack openmoji@17.0.0 && python make_table.py openmoji-17.0.0.tgz`."""
import csv, gzip, io, sys, tarfile
from pathlib import Path

COLUMNS = ["hexcode", "group", "subgroup", "annotation", "tags", "skintone", "base"]

def rows(tarball):
    "The package's table, cut to the columns that the project reads."
    with tarfile.open(tarball) as tar:
        text = tar.extractfile("package/data/openmoji.csv").read().decode()
    for r in csv.DictReader(io.StringIO(text)):
        tags = dict.fromkeys(t.strip() for t in f"{r['tags']},{r['openmoji_tags']}".split(",") if t.strip())
        yield [r["hexcode"], r["group"], r["subgroups"], r["annotation"].strip(), ", ".join(tags), r["skintone"], r["skintone_base_hexcode"]]

def main(tarball):
    "Write the table beside this file; the same package gives the same bytes."
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows(tarball))
    path = Path(__file__).with_name("openmoji.csv.gz")
    path.write_bytes(gzip.compress(out.getvalue().encode(), 9, mtime=0))
    print(f"{path.name}: {path.stat().st_size} bytes")

if __name__ == "__main__": main(sys.argv[1])
