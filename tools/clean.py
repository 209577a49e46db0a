"Clean all notebooks for a commit: nbdev_clean, and what it leaves: widgets, which no reader without a kernel can use, and progress bars."
import subprocess
from pathlib import Path

import nbformat


def is_shown(output): return output.get('name') != 'stderr' and 'application/vnd.jupyter.widget-view+json' not in output.get('data', {})


def strip(notebook):
    "Take out widget state, widget views and stderr; True if there was any."
    found = notebook.metadata.pop('widgets', None) is not None
    for cell in notebook.cells:
        if cell.cell_type == 'code' and not all(map(is_shown, cell.outputs)): cell.outputs, found = list(filter(is_shown, cell.outputs)), True
    return found


if __name__ == '__main__':
    for path in sorted(Path('nbs').glob('*.ipynb')):
        if strip(notebook := nbformat.read(path, 4)): nbformat.write(notebook, path)
    subprocess.run(['nbdev_clean'], check=True)
