"""Run notebooks and keep what they show: `python tools/notebooks.py build [nbs/x.ipynb ...]`.

`build` exports a notebook's module, runs its cells as the tests do, stores their outputs and cleans the file, so that
the site shows what really ran. Without names it builds every notebook, in the order of the layers.
"""
import os
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ['core', 'text', 'nets', 'train', 'gen', 'evals', '.', 'app']
os.environ.update(IN_TEST='1', HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false', HF_HUB_DISABLE_PROGRESS_BARS='1')
os.environ.setdefault('OMP_NUM_THREADS', '1')


def notebooks(root=ROOT):
    "Every notebook of the project, lower layers first"
    found = [p for p in (root / 'nbs').rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(root).parts)]
    return sorted(found, key=lambda p: (LAYERS.index(str(p.parent.relative_to(root / 'nbs')).split('/')[0]), p.name))


def skipped(cell, flags=('slow', 'gpu', 'net')):
    "Whether a test run leaves the cell out, by the same rule as nbdev_test"
    if cell.cell_type != 'code' or 'nbdev_export(' in cell.source: return True
    directives = getattr(cell, 'directives_', None) or {}
    return directives.get('eval:', [''])[0].lower() == 'false' or bool(set(flags) & directives.keys())


def run_and_store(path):
    "Run one notebook in a fresh shell and store what its cells show; raises where a cell fails"
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor
    path = Path(path).resolve()
    processed = NBProcessor(path, procs=FrontmatterProc, process=True).nb
    shell, here = CaptureShell(path, mpl_format='png'), Path.cwd()
    os.chdir(path.parent)
    try: shell.run_all(processed, exc_stop=True, preproc=skipped)
    except Exception: raise SystemExit(shell.prettytb(fname=path)) from None
    finally: os.chdir(here)
    ran = {cell.id: cell for cell in processed.cells if cell.cell_type == 'code' and not skipped(cell)}
    nb = read_nb(path)
    for cell in nb.cells:
        if cell.cell_type == 'code': cell.outputs = ran[cell.id].outputs if cell.id in ran else []
    write_nb(nb, path)


def build(paths):
    "Export, run, store and clean each notebook"
    from nbdev.clean import nbdev_clean
    from nbdev.export import nb_export
    for path in paths:
        nb_export(path)
        run_and_store(path)
        nbdev_clean(str(path))
        print(path.relative_to(ROOT), flush=True)


if __name__ == '__main__':
    warnings.filterwarnings('ignore', category=DeprecationWarning)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    command, *names = sys.argv[1:] or ['build']
    if command != 'build': raise SystemExit(f'unknown command {command!r}; known: build')
    build([Path(n).resolve() for n in names] or notebooks())
