"""How the site shows a definition of the library: a heading, a link to the source, what it is for, its inherited settings and its public methods.

nbdev asks for `Entry` and `fold_source` by the lines `renderer` and `procs` of settings.ini; tools/ has to be on the path
(`PYTHONPATH=tools nbdev_docs`; tools/preview.py sees to it by itself). A page runs its notebook's
cells, so what nbdev hands over belongs to `__main__`: the entry is made from the same definition in
the installed module. Below the entry the page shows the source, with the arguments and comments.
"""
import ast
import inspect
import re
from dataclasses import is_dataclass
from importlib import import_module
from io import StringIO
from textwrap import dedent
from tokenize import COMMENT, generate_tokens

from fold import only_imports
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup

from ssm_metarl._modidx import d as index

LIB = 'ssm_metarl'
LONG = 40  # lines from which the source of a class is folded: its entry says how an object is made


def public_names(module):
    "Functions and classes that a module of the library defines, without the private ones."
    return [name for name in (full.removeprefix(f'{module}.') for full in index['syms'][module]) if not name.startswith('_') and '.' not in name]


def installed(symbol):
    "The definition in the installed module that a notebook's definition became; where two modules have the name, the docstring tells them apart."
    found = [getattr(import_module(module), symbol.__name__) for module in index['syms'] if symbol.__name__ in public_names(module)]
    if symbol in found: return symbol
    return next((other for other in found if other.__doc__ == symbol.__doc__), found[0] if found else symbol)


def in_library(cls): return cls.__module__.startswith(f'{LIB}.')


def library_bases(cls):
    "Classes of the library that a class builds on, the nearest first."
    return [base for base in cls.__mro__[1:] if in_library(base)]


def function_of(member):
    "The function inside a method, class method or property; None for anything else."
    inner = getattr(member, '__func__', None) or getattr(member, 'fget', None) or member
    return inner if inspect.isfunction(inner) else None


def public_methods(cls):
    "Public methods that a class defines itself: name -> function."
    return {name: function_of(member) for name, member in vars(cls).items() if not name.startswith('_') and function_of(member)}


def about(definition):
    "Docstring of a class or function; of a small function without one, the comment beside its first line; else an empty text."
    if definition.__doc__: return inspect.cleandoc(definition.__doc__)
    if not inspect.isfunction(definition) or definition.__name__ == '<lambda>': return ''
    source, first = dedent(inspect.getsource(definition)), tree(definition).lineno
    comments = (token.string for token in generate_tokens(StringIO(source).readline) if token.type == COMMENT and token.start[0] == first)
    return next(comments, '').lstrip('#-> ')


def description(cls, name):
    "What is said about a method, or about the method of the library that it overrides; empty if nothing is."
    bases = [base for base in [cls, *library_bases(cls)] if name in public_methods(base)]
    return next(filter(None, (about(member) for base in bases for member in (vars(base)[name], public_methods(base)[name]))), '')


def address(definition):
    "Where the lines of a definition are on GitHub."
    cfg = get_config()
    return f'{cfg.git_url}/blob/{cfg.branch}/{definition.__module__.replace(".", "/")}.py#L{inspect.getsourcelines(definition)[1]}'


def page(cls, name):
    "Where the site describes a method."
    return f'{NbdevLookup().doc(f"{cls.__module__}.{cls.__name__}")}.{name.lower()}'


def as_markdown(text):
    "A docstring, so that only its `names`, paragraphs and addresses mean something to Markdown."
    parts = re.split(r'(`[^`]*`|https?://[^\s)>]*[^\s)>.,;])', re.sub(r'(?<=\w)-\n(?=\w)', '-', text))
    plain = (re.sub(r'([\\*^~$<|@]|-(?=-))', r'\\\1', part) if i % 2 == 0 else part if part.startswith('`') else f'<{part}>' for i, part in enumerate(parts))
    return ''.join(plain)


def tree(definition): return ast.parse(dedent(inspect.getsource(definition))).body[0]


def call(name, cls, function):
    "How a method is called: its name and its arguments without their types."
    if isinstance(vars(cls)[name], property): return name
    args = tree(function).args
    for arg in [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, [args.vararg, args.kwarg])]: arg.annotation = None
    if not isinstance(vars(cls)[name], staticmethod): args.args = args.args[1:]
    return f'{name}({ast.unparse(args)})'


def own_lines(cls):
    "Lines that say how an object is made: the fields of a dataclass, else the arguments of `__init__`, each with its comment."
    nodes = [node for node in tree(cls).body if isinstance(node, ast.AnnAssign)] if is_dataclass(cls) else tree(cls.__init__).args.args[1:]
    lines = dedent(inspect.getsource(cls if is_dataclass(cls) else cls.__init__)).splitlines()
    found = (lines[i] for i in sorted({i for node in nodes for i in range(node.lineno - 1, node.end_lineno)}))
    return [re.sub(r'\)( -> [^:#]*)?:(?=\s*(#|$))', '', line.replace('`', '')) for line in dedent('\n'.join(found)).splitlines()]


def inherited_lines(cls):
    "The same of the library's classes that it builds on; nothing if the class says all of it itself."
    bases = library_bases(cls)
    if is_dataclass(cls): bases = [base for base in bases if is_dataclass(base)][::-1]
    else: bases = [] if '__init__' in vars(cls) else [base for base in bases if '__init__' in vars(base)][:1]
    return [line for base in bases for line in [f'# from {base.__name__}', *own_lines(base)]]


def constructor_lines(cls):
    "How an object is made: what its bases in the library want, and what the class itself does."
    says = is_dataclass(cls) and '__annotations__' in vars(cls) or inspect.isfunction(vars(cls).get('__init__')) and not is_dataclass(cls)
    return [*inherited_lines(cls), *(own_lines(cls) if says else [])]


class Entry:
    "What a page says of one function or class, as Markdown."
    def __init__(self, symbol, name=None, title_level=3):
        self.symbol, self.level = installed(symbol), title_level
        self.name = name or self.symbol.__qualname__

    def method(self, cls, name, function):
        "One item of the list of methods: a link to the source that is an anchor too, and the description."
        text = ' '.join(as_markdown(description(self.symbol, name)).split())
        shown = re.sub(r'[^\w\s(),=:]', lambda sign: f'&#{ord(sign[0])};', call(name, cls, function))  # or quotes would be set as in prose
        anchor = f'{self.name}.{name}'.lower()
        return f'- <a class="method" id="{anchor}" href="{address(function)}"><code>{shown}</code></a> {text}'.rstrip()

    def methods(self):
        "The list of methods, those of private bases among them, and links to those that come from public ones."
        bases = library_bases(self.symbol)
        own = [self.symbol, *(base for base in bases if base.__name__.startswith('_'))]
        if items := [self.method(cls, name, function) for cls in own for name, function in public_methods(cls).items()]: yield '\n'.join(items)
        seen = {name for cls in own for name in vars(cls)}
        for base in (base for base in bases if base not in own):
            names = [name for name in public_methods(base) if name not in seen]
            if names: yield f'From `{base.__name__}`: ' + ', '.join(f'<a href="{page(base, name)}"><code>{name}</code></a>' for name in names) + '.'
            seen |= set(names)

    def parts(self):
        "A rule, a heading, a link to the source, the docstring, how it is imported; of a class also how it is made, and its methods."
        yield from ('---', f'{"#" * self.level} {self.name}', f'<a class="source" href="{address(self.symbol)}">source</a>')
        yield as_markdown(about(self.symbol))
        made = constructor_lines(self.symbol) if inspect.isclass(self.symbol) else []
        yield '\n'.join(['```python', f'from {self.symbol.__module__} import {self.name}', *[''] * bool(made), *made, '```'])
        if inspect.isclass(self.symbol): yield from self.methods()

    def _repr_markdown_(self): return '\n\n'.join(filter(None, self.parts()))


def fold_source(cell):
    """Show the source below an entry as a fold, open unless it is a long class, and cells of imports as one that is closed, unless the cell says how.
    Instead of nbdev's own `add_fold`, which would say it a second time; Quarto rejects that."""
    if cell.cell_type != 'code' or '#| code-fold' in cell.source: return
    if 'exports' in cell.directives_:
        long_class = re.search(r'^class ', cell.source, re.M) and len(cell.source.splitlines()) > LONG
        shown = 'true' if long_class else 'show'
        cell.source = f'#| code-fold: {shown}\n#| code-summary: "Source"\n{cell.source}'
    elif only_imports(cell.source): cell.source = f'#| code-fold: true\n#| code-summary: "Imports"\n{cell.source}'


def local_links(cell):
    """Links between pages without the address of the published site, so that a copy of the site leads to itself; and one link where
    nbdev has put a second one into the text of a link, which Markdown does not allow."""
    cfg = get_config()
    home = f'{cfg.doc_host}{cfg.doc_baseurl}/'

    def mended(text):
        text = text.replace(f']({home}', '](').replace(f'href="{home}', 'href="')
        return re.sub(r'\[\[(`[^`]*`)\]\([^)]*\)\]', r'[\1]', text)

    if cell.cell_type == 'markdown': cell.source = mended(cell.source)
    for output in cell.get('outputs', []):
        data = output.get('data', {})
        if 'text/markdown' in data: data['text/markdown'] = mended(''.join(data['text/markdown']))
