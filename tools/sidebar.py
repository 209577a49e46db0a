"The sidebar of the site, as _quarto.yml has it: which pages there are, in which order, and what a link to each says."
from pathlib import Path

import yaml

NBS = Path('nbs')


def contents():
    "Sections and links, nested as in _quarto.yml."
    return yaml.safe_load(Path('_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']


def links(section):
    "File and text of each link, in order."
    for item in section:
        if isinstance(item, str): yield item, Path(item).stem
        elif 'contents' in item: yield from links(item['contents'])
        else: yield item['href'], item['text']


def unlisted():
    "One line for each notebook that the sidebar lacks, or that it names in vain."
    listed = [file for file, _ in links(contents())]
    yield from (f'{file}: in the sidebar of _quarto.yml, but not in nbs' for file in listed if not (NBS / file).exists())
    yield from (f'{path.name}: not in the sidebar of _quarto.yml' for path in sorted(NBS.glob('*.ipynb')) if path.name not in listed)
