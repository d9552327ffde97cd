"Build `dmlfast` from `settings.ini`, the one home of its metadata"
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup
import re

cfg = ConfigParser(delimiters='=')
cfg.read(Path(__file__).with_name('settings.ini'), encoding='utf-8')
cfg = cfg['DEFAULT']

def _list(key): return cfg.get(key, '').split()

init = Path(__file__).parent/cfg['lib_path']/'__init__.py'
licenses = dict(apache2='Apache-2.0', mit='MIT', bsd3='BSD-3-Clause')
statuses = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature', '7 - Inactive']

setup(
    version=re.search(r'''__version__ = ['"](.+?)['"]''', init.read_text(encoding='utf-8'))[1],
    license=licenses[cfg['license']],
    author=cfg['author'], author_email=cfg['author_email'],
    keywords=_list('keywords'),
    classifiers=[f"Development Status :: {statuses[cfg.getint('status')-1]}",
        f"Intended Audience :: {cfg['audience']}", f"Natural Language :: {cfg['language']}",
        'Programming Language :: Python :: 3'],
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path']+'.*']),
    include_package_data=True,
    install_requires=_list('requirements'),
    extras_require={k.removesuffix('_requirements'): _list(k) for k in cfg if k.endswith('_requirements')},
    long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    entry_points={'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"], 'console_scripts': _list('console_scripts')},
    zip_safe=False)
