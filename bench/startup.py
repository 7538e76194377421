"""How long the package takes to import and the command line to help, over bare Python: medians of paired runs.

Peers in the same run: bare `python -c pass`, and `import typer, rich, pydantic`, what the command line is made of.
"""
import statistics
import subprocess
import sys
import time

COMMANDS = {'bare python': ['-c', 'pass'], 'import typer, rich, pydantic': ['-c', 'import typer, rich, pydantic'],
            'import lab_lm': ['-c', 'import lab_lm'], 'lab_lm --help': ['-m', 'lab_lm', '--help']}


def seconds(words):
    "Wall seconds of one fresh interpreter"
    began = time.perf_counter()
    subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


rounds = [{name: seconds(words) for name, words in COMMANDS.items()} for _ in range(8)][1:]
for name in COMMANDS:
    over = statistics.median(r[name] - r['bare python'] for r in rounds)
    print(f"{name:<30} {statistics.median(r[name] for r in rounds):6.3f} s, {over:+.3f} s over bare python (median of {len(rounds)} rounds)")
