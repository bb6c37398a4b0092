"""A budget for file sizes: a Python file over 400 lines is named, one over 600 fails the check.

A file is read in one sitting or it is not read; the limit makes the split happen while it is still cheap.
"""

import sys
from pathlib import Path

ASK, FAIL = 400, 600
FOLDERS = ("qcompile", "passes", "codegen", "tests", "bench")

root = Path(__file__).resolve().parent.parent
sizes = {
    path.relative_to(root): len(path.read_text(encoding="utf-8").splitlines())
    for folder in FOLDERS
    for path in sorted((root / folder).rglob("*.py"))
    if not any(part.is_symlink() for part in path.relative_to(root).parents if part.name)
}
for path, lines in sizes.items():
    if lines > ASK:
        level = "error" if lines > FAIL else "warning"
        print(f"{level}: {path} has {lines} lines; over {ASK} asks why, over {FAIL} fails")
print(f"{len(sizes)} files, {sum(sizes.values())} lines, longest {max(sizes.values(), default=0)}")
sys.exit(any(lines > FAIL for lines in sizes.values()))
