"Packaging: everything is read from settings.ini, where nbdev keeps it too."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=['='])
config.read(Path(__file__).with_name('settings.ini'), encoding='utf-8')
cfg = config['DEFAULT']
extras = {name.removesuffix('_requirements'): value.split() for name, value in cfg.items() if name.endswith('_requirements')}

setup(
    name=cfg['repo'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=Path('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    keywords=cfg['keywords'].split(),
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license='Apache-2.0',
    packages=find_packages(include=[f'{cfg["lib_path"]}*']),
    package_data={cfg['lib_path']: ['py.typed']},
    python_requires=f'>={cfg["min_python"]}',
    install_requires=cfg['requirements'].split(),
    extras_require=extras,
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'nbdev': [f'{cfg["lib_path"]}={cfg["lib_path"]}._modidx:d'],  # lets nbdev link names in backticks to their documentation
    },
)
