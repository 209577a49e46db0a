"How the site is made: entries of definitions, links at the foot of notebooks, folding, and the measuring of pages in a browser."
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'tools'))

import browse  # noqa: E402
import check_nbs  # noqa: E402
import fold  # noqa: E402
import foot  # noqa: E402
import preview  # noqa: E402
import readme  # noqa: E402
import reference  # noqa: E402
import sidebar  # noqa: E402

from ssm_metarl import compiling, cores, digits, guards, ssm, strategies  # noqa: E402


@pytest.fixture(autouse=True)
def at_the_top(monkeypatch): monkeypatch.chdir(ROOT)


def entry(symbol): return reference.Entry(symbol)._repr_markdown_()


def as_in_a_notebook(symbol):
    "A definition with the same name and docstring, as a page has it that ran its notebook."
    return type(symbol.__name__, (), {'__doc__': symbol.__doc__, '__module__': '__main__'})


def test_an_entry_is_made_from_the_installed_module():
    text = entry(as_in_a_notebook(ssm.SSMConfig))
    assert text == entry(ssm.SSMConfig) and '__main__' not in text
    line = int(text.split('/ssm_metarl/ssm.py#L')[1].split('"')[0])
    assert 'dataclass' in (ROOT / 'ssm_metarl/ssm.py').read_text().splitlines()[line - 1]


def test_names_that_two_modules_share_are_told_apart():
    def copy(function):
        def split(): pass
        split.__doc__ = function.__doc__
        return split
    assert '/guards.py#L' in entry(copy(guards.split)) and '/compiling.py#L' in entry(copy(compiling.split))


def test_an_entry_lists_public_methods_and_what_is_inherited():
    text = entry(strategies.Tent)
    assert [part.split('"')[0] for part in text.split('id="')[1:]] == ['tent.context', 'tent.own_loss', 'tent.post_loss']
    assert 'From `AdaptationStrategy`: ' in text and '#adaptationstrategy.configure"' in text
    assert 'args, **kwargs' not in text
    assert '<code>A_bar</code></a> Diagonal of the discrete state matrix, [P].' in entry(ssm.SSM)  # a property of a private base
    assert 'What is minimised when the caller has no loss' in text  # the docstring of the method that it overrides


def test_fields_and_arguments_keep_their_comments():
    text = entry(ssm.SSMConfig)
    assert '# from LayerConfig\ninput_dim: int # D, features in\nstate_dim: int = 64 # N, real numbers of state' in text
    assert '# from Core\nconfig: LayerConfig, # input_dim D, state_dim N, output_dim H\nseed: int = 0 # of the initial parameters\n```' in entry(cores.H3)
    assert all('`' not in block for block in text.split('```python')[1].split('```')[:1])


def test_an_entry_says_how_a_definition_is_imported_and_made():
    assert '```python\nfrom ssm_metarl.guards import split\n```' in entry(guards.split)
    assert entry(ssm.SSMConfig).split('```')[1].startswith('python\nfrom ssm_metarl.ssm import SSMConfig\n\n')
    made = entry(ssm.SSM).split('```')[1]
    assert 'from ssm_metarl.ssm import SSM\n\n' in made and 'config: ' in made


def test_links_lead_inside_a_copy_of_the_site():
    home = f'{reference.get_config().doc_host}{reference.get_config().doc_baseurl}/'
    cell = new_markdown_cell(f'[`x`]({home}ssm.html#x) <a href="{home}ssm.html#ssm.f">f</a> [out](https://example.org/)')
    reference.local_links(cell)
    assert cell.source == '[`x`](ssm.html#x) <a href="ssm.html#ssm.f">f</a> [out](https://example.org/)'
    inside = new_markdown_cell(f'the function [[`scan`]({home}scan.html#scan)](00_scan.ipynb) takes')
    reference.local_links(inside)
    assert inside.source == 'the function [`scan`](00_scan.ipynb) takes'
    code = new_code_cell('x', outputs=[new_output('display_data', {'text/markdown': f'see [y]({home}y.html)'})])
    reference.local_links(code)
    assert code.outputs[0].data['text/markdown'] == 'see [y](y.html)'


def test_the_list_of_all_definitions_is_that_of_today():
    notebook = nbformat.read(ROOT / 'nbs/reference.ipynb', 4)
    shown, = (output.data['text/markdown'] for cell in notebook.cells if cell.cell_type == 'code' for output in cell.outputs)
    listed = set(re.findall(r'\[`(\w+)`\]\((\w+\.ipynb)#', ''.join(shown)))
    assert {name for name, _ in listed} == {name for module in reference.index['syms'] for name in reference.public_names(module)}
    assert ('MetaMAML', '04_maml.ipynb') in listed


def test_a_comment_beside_the_first_line_describes_a_small_function():
    def half(x, mark='#'): return x / 2  # -> what is left of `x`
    def loud(x):  # not this
        "But this."
    def silent(x): return '# x'
    assert [reference.about(f) for f in (half, loud, silent)] == ['what is left of `x`', 'But this.', '']
    assert reference.description(cores.H3, 'state_dtype') == 'of a state, for parameters of this dtype'  # said of Core's
    assert not reference.description(digits.DigitNet, '__init__') and 'logits' in reference.description(digits.DigitNet, 'forward')  # not what PyTorch says


def test_docstrings_are_no_markdown():
    given = '|A|^2 in [M, K] costs $5 --now and <b> @x `a * b`, see https://arxiv.org/abs/1703.03400. Half-\nopen'
    assert reference.as_markdown(given) == r'\|A\|\^2 in [M, K] costs \$5 \--now and \<b> \@x `a * b`, see <https://arxiv.org/abs/1703.03400>. Half-open'


def test_the_source_is_folded_once():
    cell = lambda source, **directives: SimpleNamespace(cell_type='code', source=source, directives_=directives)
    plain, own, other = cell('def f(): pass', exports=[]), cell('#| code-fold: true\ndef f(): pass', exports=[]), cell('x = 1')
    imports = cell('import os\nfrom a import b')
    for each in (plain, own, other, imports): reference.fold_source(each)
    for head, fold in (('class A:', 'true'), ('def f():', 'show')):  # an entry says how a class is made, and not what a function takes
        long = cell(head + '\n    pass' * reference.LONG, exports=[])
        reference.fold_source(long)
        assert long.source.startswith(f'#| code-fold: {fold}\n#| code-summary: "Source"\n')
    assert plain.source == '#| code-fold: show\n#| code-summary: "Source"\ndef f(): pass'
    assert own.source == '#| code-fold: true\ndef f(): pass' and other.source == 'x = 1'
    assert imports.source == '#| code-fold: true\n#| code-summary: "Imports"\nimport os\nfrom a import b'


def test_a_page_without_a_method_is_found():
    page = preview.Page('<h3 id="tent">Tent</h3><a id="tent.context"></a>')
    found = [x for x in preview.undescribed({'strategies.html': page}) if x.startswith('strategies.html: ssm_metarl.strategies.Tent')]
    assert found == [f'strategies.html: ssm_metarl.strategies.Tent.{name} is not on the page' for name in ('own_loss', 'post_loss')]


def test_raw_links_in_code_are_found():
    page = preview.Page('<p>a ](https://x.org)</p><pre><code>def f(x): # see [`g`](https://x.org/g)</code></pre>')
    assert len(list(preview.links_in_code({'a.html': page}))) == 1
    assert not list(preview.links_in_code({'a.html': preview.Page('<p>](https://x.org)</p>')}))


def test_headings_have_the_identifiers_of_pandoc():
    html = preview.MarkdownWithMath(renderer=preview.Renderer()).render("## What's `next_one`? A.B\n\n## 2 ways\n\n## 2 ways\n")
    assert [part.split('"')[0] for part in html.split('id="')[1:]] == ['whats-next_one-a.b', 'ways', 'ways-1']


def test_the_sidebar_names_every_notebook_once():
    files = [file for file, _ in sidebar.links(sidebar.contents())]
    assert not list(sidebar.unlisted()) and len(files) == len(set(files))
    assert files[:2] == ['index.ipynb', '00_ssm.ipynb']


def test_a_foot_is_written_once_and_kept_true():
    lines, titles = ({file: row[i] for file, *row in foot.feet()} for i in (1, 0))
    assert lines['01_policy.ipynb'].startswith('Part 2 of 11 of the course · Previous: [00 State space models](00_ssm.ipynb) · Next: [02 ')
    assert lines['00_scan.ipynb'].startswith('Previous: ') and titles['01_policy.ipynb'] == '01 A policy with a memory'
    assert 'index.ipynb' not in lines and 'Next:' not in list(lines.values())[-1]
    text = 'Further reading\n\n- a book'
    once = foot.with_foot(text, lines['01_policy.ipynb'])
    assert once == f'{text}\n\n{lines["01_policy.ipynb"]}' and foot.with_foot(once, lines['01_policy.ipynb']) == once
    assert foot.with_foot(once, lines['02_envs.ipynb']) == f'{text}\n\n{lines["02_envs.ipynb"]}'
    assert foot.with_foot(foot.with_foot(text, list(lines.values())[-1]), 'x') == f'{text}\n\nx'
    notebook = new_notebook(cells=[new_markdown_cell('# first\n\n> what it is'), new_markdown_cell(text), new_code_cell('1')])
    line = lines['02_envs.ipynb']
    assert foot.put(notebook, 'Title', line) and not foot.put(notebook, 'Title', line) and notebook.cells[0].source == '# Title\n\n> what it is'


def test_home_names_each_page_as_the_sidebar_does_and_adds_up_its_minutes():
    text = '\n'.join(cell.source for cell in nbformat.read(readme.HOME, 4).cells if cell.cell_type == 'markdown')
    rows = [line.split(' | ') for line in text.splitlines() if line.startswith('| [')]
    assert sorted(row[0] for row in rows) == sorted(f'| [{name}]({file})' for file, name in sidebar.links(sidebar.contents()) if file not in ('index.ipynb', 'reference.ipynb'))
    minutes = [int(row[1]) for row in rows if row[1].isdigit()]
    assert len(minutes) == 11 and f'| **in all** | **{sum(minutes)}** |' in text
    wrong = text.replace('[01 A policy with a memory](01_policy.ipynb) | 30 |', '[Policy](01_policy.ipynb) | 7 |').replace('**in all** | **', '**in all** | **1')
    assert wrong != text and readme.with_pages(wrong) == text
    own = 'see [the policy](01_policy.ipynb), and\n| [a table](https://x.org) | 1 |'
    assert readme.with_pages(own) == own


def test_a_page_says_how_long_it_takes():
    page = lambda *texts: new_notebook(cells=[new_markdown_cell(text) for text in ('# Page', *texts)])
    assert readme.minutes(page('It takes 30\nminutes.', 'In 5 minutes')) == 30 and readme.minutes(page('*35 minutes, if you skim.*')) == 35
    with pytest.raises(SystemExit, match="'# Page' does not say how many minutes"): readme.minutes(page('Nothing', *'abcdef', '40 minutes'))


def test_imports_and_folded_cells_are_folded_in_jupyterlab():
    sources = {'import os\nfrom x import y': True, '#| export\nimport os': True, '#| code-fold: true\n#| code-summary: "Tests"\nassert True': True, 'import os\nprint(1)': False,
               '#| code-fold: show\nx = 1': False, '#| code-fold: show\nimport os': False, '#| hide\nassert True': True, '#| echo: false\nx': True, '%matplotlib inline': False, '# import os': False}
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
    notebook.cells[3].metadata['jupyter'] = {'outputs_hidden': True}
    assert fold.fold(notebook) and not fold.fold(notebook)
    assert [cell.metadata.get('jupyter') == {'source_hidden': True} for cell in notebook.cells] == list(sources.values())
    assert 'jupyter' not in notebook.cells[3].metadata


def test_nbdev_clean_keeps_the_folding(tmp_path):
    from nbdev.clean import _nbdev_clean
    notebook = nbformat.from_dict({'cells': [new_code_cell('import os')], 'metadata': {}, 'nbformat': 4, 'nbformat_minor': 5})
    fold.fold(notebook)
    notebook.cells[0].metadata['tags'] = ['x']
    _nbdev_clean(notebook)
    assert notebook.cells[0].metadata == {'jupyter': {'source_hidden': True}}


def test_a_public_definition_shows_its_source():
    cell = lambda source: {'source': [source], 'cell_type': 'code'}
    assert check_nbs.hides_its_source(cell('#| export\ndef f(): pass\ndef _g(): pass')) == ['f']
    for fine in ('#| exports\ndef f(): pass', '#| export\nN = 3', '#| export\ndef _f(): pass', 'def f(): pass'): assert not check_nbs.hides_its_source(cell(fine))


needs_browser = pytest.mark.skipif(bool(browse.browser_missing()), reason=f'{browse.browser_missing()} is not installed here')
WIDE, PAGE = 'x' * 300, '<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width"><link rel="stylesheet" href="styles.css"><main>{}</main>'


@needs_browser
def test_the_browser_finds_what_is_wide_or_cut_off(tmp_path):
    (tmp_path / 'styles.css').write_text((ROOT / 'nbs/styles.css').read_text())
    pages = {
        'good': f'<pre>{WIDE}</pre><table><tr><td>{"<div style=width:600px>wide</div>"}</td></tr></table><p>see <code>{WIDE}</code></p><p>short</p>',
        'wide': '<div style="width:700px">wide</div>',
        'cut': f'<pre style="overflow-x:hidden">{WIDE}</pre>',
        'folded': f'<details><summary>Code</summary><pre style="overflow-x:hidden">{WIDE}</pre></details>',
        'no_picture': '<img src="nowhere.png">',
    }
    for name, body in pages.items(): (tmp_path / f'{name}.html').write_text(PAGE.format(body))
    with browse.browser() as driver: found = {name: ' '.join(browse.faults(driver, tmp_path / f'{name}.html')) for name in pages}
    assert found['good'] == ''
    assert 'at 390 px (phone): the page is' in found['wide'] and 'at 1200 px' not in found['wide']
    assert 'cut off: <pre>' in found['cut'] and 'cut off: <pre>' in found['folded'] and 'no picture at nowhere.png' in found['no_picture']


def test_home_needs_no_clone(tmp_path, monkeypatch):
    "On Colab there is no benchmarks/results beside the notebook: the files come from the repository's address."
    cells = [cell.source for cell in nbformat.read(ROOT / 'nbs/index.ipynb', 4).cells if cell.cell_type == 'code']
    asked, space = [], {}
    monkeypatch.chdir(tmp_path)
    for source in cells[1:3]: exec(source, space)  # imports, and what the tables need

    def from_github(address):
        asked.append(address)
        return open(ROOT / address.removeprefix('https://raw.githubusercontent.com/ssm-metarl/ssm-metarl/main/'))
    space['urlopen'] = from_github
    tables = [source for source in cells if 'measured(' in source and 'def measured' not in source and 'EnvBatch' not in source]
    space['mdps'] = space['measured']('mdp-10')['table']
    for source in tables: exec(source, space)
    assert len(asked) == 6 and asked[1].endswith('/main/benchmarks/results/basic.json')
    read = [source for source in cells if 'benchmarks' in source and 'def measured' not in source]
    assert not read and "find_spec('ssm_metarl') is None" in cells[0] and 'git+https://github.com/ssm-metarl/ssm-metarl' in cells[0]
