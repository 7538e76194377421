"Make constraints.txt anew: one set of exact versions, tested together, with a line for each Python where they differ"
import re
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HELD = ['torch==2.13.0', 'nbdev==2.4.14', 'execnb==0.1.18', 'fastcore==1.14.5'] # What the resolver must not move
HEAD = "# The versions that were tested together, on every Python from 3.10; 'make pins' makes this file anew from settings.ini.\n"

config = ConfigParser(delimiters=['='])
config.read(ROOT / 'settings.ini', encoding='utf-8')
needs = [line for key, value in config['DEFAULT'].items() if key.endswith('requirements') for line in value.splitlines() if line.strip()]
with tempfile.TemporaryDirectory() as folder:
    wanted, held = Path(folder) / 'in.txt', Path(folder) / 'held.txt'
    wanted.write_text('\n'.join(needs))
    held.write_text('\n'.join(HELD))
    found = subprocess.run([str(Path(sys.executable).with_name('uv')), 'pip', 'compile', '--universal', '--python-version', config['DEFAULT']['min_python'], '--no-annotate', '--no-header',
                            '-c', str(held), str(wanted)], capture_output=True, text=True, check=True).stdout
lines = [line for line in found.splitlines() if not re.match(r'nvidia-|cuda-|triton', line)] # torch pins these itself
(ROOT / 'constraints.txt').write_text(HEAD + '\n'.join(lines) + '\n')
