"Everything about the package is said in settings.ini; this file hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(HERE / 'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']


def lines(key):
    "The non-empty lines of one setting"
    return [line.strip() for line in cfg.get(key, '').splitlines() if line.strip()]


EXTRA = '_requirements'
readme = HERE / 'README.md'

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'],
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords=cfg['keywords'].split(),
    python_requires='>=' + cfg['min_python'],
    packages=find_packages(include=[cfg['lib_name'], cfg['lib_name'] + '.*']),
    include_package_data=True,
    install_requires=lines('requirements'),
    extras_require={key.removesuffix(EXTRA): lines(key) for key in cfg if key.endswith(EXTRA)},
    entry_points={'console_scripts': lines('console_scripts'), 'nbdev': ['lab_lm=lab_lm._modidx:d']},
    zip_safe=False,
)
