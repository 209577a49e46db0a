"Rules for the notebooks that nbdev does not check. Run from the top of the repository; prints each breach, exits 1 if there is one."
import ast
import base64
import json
import re
import struct
import sys
from configparser import ConfigParser
from pathlib import Path

MAX_CELLS, MAX_BYTES, MAX_COLUMNS, MAX_LINES, MAX_CLASS, MAX_METHOD, WIDEST, HIGHEST = 80, 1_500_000, 100, 60, 100, 15, 580, 340  # of a figure: 6 x 3.5 inches with its margin, at 96 pixels an inch
NO_MODULE = {'index', 'reference', '03c_meta_gradient', '08f_plugins', '08g_results', '09_train_eval_adapt'}
NO_LECTURE = {'index', 'reference', '00_files', '00_registry', '00_style', '04e_lending', '04f_weights', '04g_guarded_learner', '04h_hooks', '08_config', '08a_checkpoints', '08c_pipeline', '08d_studies', '08e_command_line', '08f_plugins', '08g_results', '09_train_eval_adapt'}  # no idea is taught there, so nothing is drawn and no exercise given
HAND_MADE = {'__init__.py', '__main__.py', '_modidx.py'}


def source(cell): return ''.join(cell['source'])


def exports(cell): return re.search(r'^#\|\s*exports?\b', source(cell), re.M) is not None


def hides_its_source(cell):
    "Public definitions that a cell exports without showing their code on the site."
    shown = re.search(r'^#\|\s*exports\b', source(cell), re.M) is not None
    return [] if shown or not exports(cell) else [node.name for node in definitions(cell) if not node.name.startswith('_')]


def imports_mixed_with_code(cell):
    "A cell with an import is run whole by the documentation build, so imports stand alone."
    if not any(re.match(r'\s*(import|from) ', line) for line in source(cell).splitlines()): return False
    lines = [line for line in source(cell).splitlines() if not line.lstrip().startswith(('%', '!'))]
    try: body = ast.parse('\n'.join(lines)).body
    except SyntaxError: return False
    kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in body}
    return kinds == {True, False}


def imported_modules(cell, lib):
    "Names of this library's modules that a cell imports."
    return re.findall(rf'^\s*(?:from|import) {lib}\.(\w+)', source(cell), re.M)


def foreign_imports(cells):
    "What code cells import from elsewhere: its top-level name, and whether the cell needs it (it may do without what a function or a `try` imports)."
    for cell in cells:
        if cell['cell_type'] != 'code': continue
        try: tree = ast.parse('\n'.join(line for line in source(cell).splitlines() if not line.lstrip().startswith(('%', '!'))))
        except SyntaxError: continue
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in {name.split('.')[0] for name in names} - sys.stdlib_module_names: yield name, node in tree.body


def installed(root, *extras):
    "Top-level names that the library and some of its extras install."
    settings = ConfigParser(delimiters=['='])
    settings.read(root / 'settings.ini', encoding='utf-8')
    wanted = (settings['DEFAULT'][key].split() for key in ('requirements', *(f'{extra}_requirements' for extra in extras)))
    names = {re.split(r'[\[<>=]', requirement)[0] for group in wanted for requirement in group}
    brought = {'IPython'} if 'notebook' in extras else set()  # by ipykernel
    return brought | {{'scikit-learn': 'sklearn', 'pillow': 'PIL'}.get(name, name).replace('-', '_') for name in names} | {settings['DEFAULT']['lib_name']}


def definitions(cell):
    "Functions and classes that a cell defines."
    try: return [node for node in ast.parse(source(cell)).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    except SyntaxError: return []


def body_lines(function):
    "Lines of a function without its signature (a parameter a line) and its docstring."
    first = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return function.end_lineno - first[0].lineno + 1 if first else 0


def long_code(cell):
    "What of a cell's code is too long to be read."
    lines = source(cell).splitlines()
    if (widest := max(map(len, lines), default=0)) > MAX_COLUMNS: yield f'has a line of {widest} columns; at most {MAX_COLUMNS}'
    if not exports(cell): return
    found = definitions(cell)
    if len(public := [node.name for node in found if not node.name.startswith('_')]) > 1: yield f'exports {len(public)} public definitions ({", ".join(public)}); one a cell'
    limit = MAX_CLASS if any(isinstance(node, ast.ClassDef) for node in found) else MAX_LINES
    if len(lines) > limit: yield f'exports {len(lines)} lines; at most {limit}'
    for node in found:
        for method in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(method, ast.FunctionDef) and body_lines(method) > MAX_METHOD: yield f'{node.name}.{method.name} has {body_lines(method)} lines; at most {MAX_METHOD}'


def title(cell):
    "What is wrong with the first cell: it is front matter to nbdev, and anything below the description vanishes from the page."
    if not re.fullmatch(r'# [^\n]+\n\n> [^\n]+\n?', source(cell)): yield 'is not a title and a `> description` alone'


def opening(cells):
    "What the first paragraphs leave out: how long a notebook takes, and what a reader needs."
    text = ' '.join(source(cell) for cell in cells[1:9] if cell['cell_type'] == 'markdown')
    if not re.search(r'\b\d+\s+minutes', text): yield 'does not open with a reading time (`It takes 20 minutes`)'
    if not re.search(r'\b[Nn]eeds?\b|\bRead\b|\bknow\b|have read', text): yield 'does not open with what a reader needs'


def is_figure(cell):
    "A picture with a text for those who cannot see it."
    if cell['cell_type'] == 'markdown': return re.search(r'!\[[^\]]+\]\(', source(cell)) is not None
    drawn = any(kind.startswith('image/') for output in cell.get('outputs', []) for kind in output.get('data', {}))
    return drawn and re.search(r'^#\|\s*fig-alt:\s*\S', source(cell), re.M) is not None


def figures(cell):
    "What is wrong with the look of the figures of a cell (nbs/00_style.ipynb)."
    drawn = [output for output in cell.get('outputs', []) if 'image/png' in output.get('data', {}) and ''.join(output['data'].get('text/plain', '')).startswith(('<Figure', '<Shown'))]
    for output in drawn:
        width, height = (output['metadata'].get('image/png', {}).get(side, 0) for side in ('width', 'height'))
        if struct.unpack('>I', base64.b64decode(output['data']['image/png'])[16:20])[0] < 2 * width or not width: yield 'stores a figure without double resolution; call `use_style()` in the set-up cell'
        if width > WIDEST or height > HIGHEST: yield f'stores a figure of {width} x {height} pixels; at most {WIDEST} x {HIGHEST}, which is 6 x 3.5 inches'
    if drawn and 'subplots(' in source(cell) and not re.search(r'dress\(|title|plot_', source(cell)): yield 'draws a figure without a title; use `dress`'
    if (drawn or 'ax.' in source(cell)) and (own := re.findall(r"\bcmap='\w+'|\bcolor='(?!none|white)[^']*'|'C\d'|'tab:\w+'|'#[0-9A-Fa-f]{6}'|plt\.cm\.\w+", source(cell))): yield f'draws with {", ".join(sorted(set(own)))}; take `COLOURS`, `SERIES` or `colour_map()` of the module `style`'


def lecture(cells):
    "What a notebook that teaches an idea lacks."
    if (n := sum(map(is_figure, cells))) < 2: yield f'{n} figures with alt text (`#| fig-alt:`); two are needed'
    for i, cell in enumerate(cells):
        if any(kind.startswith('image/') for output in cell.get('outputs', []) for kind in output.get('data', {})) and not is_figure(cell): yield f'cell {i} draws a figure without `#| fig-alt:`'
    parts, inside = [], False
    for cell in cells:
        if cell['cell_type'] == 'markdown' and (headings := re.findall(r'^## .*', source(cell), re.M)): inside = headings[-1].startswith('## Exercises') or inside and len(headings) == 0
        if inside: parts.append(cell)
    text = '\n'.join(source(cell) for cell in parts if cell['cell_type'] == 'markdown')
    asked = len(re.findall(r'^\*\*\d+\. ', text, re.M))
    checkers = [node.name for cell in parts if cell['cell_type'] == 'code' for node in definitions(cell) if node.name.startswith('check_')]
    solved = [i for i, cell in enumerate(parts) if re.search(r'^#\|\s*code-summary:\s*"?Solution', source(cell), re.M)]
    if asked < 3: yield f'{asked} exercises (`**1. Title.** ...` below `## Exercises`); three are needed'
    if len(checkers) < 3: yield f'{len(checkers)} checkers (`def check_...`) among the exercises; three are needed'
    if not solved: yield 'no folded solution (`#| code-summary: Solution ...`)'


def check(root):
    "All breaches, one line each."
    lib, problems, owner = 'ssm_metarl', [], {}
    notebooks = sorted(p for p in (root / 'nbs').glob('*.ipynb') if not p.name.startswith(('_', '.')))
    cells = {p: json.loads(p.read_text())['cells'] for p in notebooks}
    for path in notebooks:
        say = lambda text: problems.append(f'{path.name}: {text}')
        found = [m for c in cells[path] if c['cell_type'] == 'code' for m in re.findall(r'^#\|\s*default_exp (\w+)', source(c), re.M)]
        if path.stem not in NO_MODULE and len(found) != 1: say(f'{len(found)} default_exp lines; one is needed')
        for module in found:
            if module in owner: say(f'exports module {module}, which {owner[module].name} exports too')
            owner[module] = path
        problems += [f'{path.name}: cell 0 {x}' for x in title(cells[path][0])]
        problems += [f'{path.name}: cell {i} {x}' for i, c in enumerate(cells[path]) if c['cell_type'] == 'code' for x in long_code(c)]
        if path.stem != '00_style': problems += [f'{path.name}: cell {i} {x}' for i, c in enumerate(cells[path]) if c['cell_type'] == 'code' for x in figures(c)]
        if path.stem not in NO_LECTURE: problems += [f'{path.name}: {x}' for x in lecture(cells[path])]
        if len(cells[path]) > MAX_CELLS: say(f'{len(cells[path])} cells; at most {MAX_CELLS}, split it by idea')
        if path.stat().st_size > MAX_BYTES: say(f'{path.stat().st_size / 1e3:.0f} kB; at most {MAX_BYTES / 1e3:.0f}, use fewer or smaller figures')
        imported = set(foreign_imports(cells[path]))
        if missing := {name for name, needed in imported if needed} - installed(root, 'notebook'): say(f'imports {", ".join(sorted(missing))}, which the extra `notebook` does not install')
        if missing := {name for name, needed in imported if not needed} - installed(root, 'notebook', 'interop', 'mujoco', 'bench'): say(f'may import {", ".join(sorted(missing))}, which no extra installs')
        if 'widgets' in json.loads(path.read_text())['metadata']: say('widget state is stored in its metadata; clear it')
        for i, cell in enumerate(cells[path]):
            for output in cell.get('outputs', []):
                text = json.dumps(output)
                if output['output_type'] == 'error': say(f'cell {i} stores an error')
                if 'application/vnd.jupyter.widget' in text: say(f'cell {i} stores a widget view; clear its output')
                if re.search(r'/(work|tmp|home|root|Users)/', re.sub(r'"image/png": "[^"]*"', '', text)): say(f'cell {i} shows a path of the machine it ran on')
            if cell['cell_type'] == 'code' and (hidden := hides_its_source(cell)): say(f'cell {i} exports {", ".join(hidden)} with `#| export`; `#| exports` shows the code on the site too')
            if cell['cell_type'] == 'code' and imports_mixed_with_code(cell): say(f'cell {i} mixes imports with code; give the imports a cell of their own')
    for path in notebooks:  # data flows one way: a module imports lower-numbered ones only
        for cell in cells[path]:
            if cell['cell_type'] == 'code' and exports(cell):
                for module in imported_modules(cell, lib):
                    if module in owner and owner[module].name >= path.name: problems.append(f'{path.name}: exported code imports {module}, which is not lower-numbered')
    for module in sorted((root / lib).glob('*.py')):
        if module.name not in HAND_MADE and module.stem not in owner: problems.append(f'{lib}/{module.name}: no notebook exports it')
    return problems


if __name__ == '__main__':
    problems = check(Path(sys.argv[1] if len(sys.argv) > 1 else '.'))
    print('\n'.join(problems) or 'notebooks are in order')
    sys.exit(bool(problems))
