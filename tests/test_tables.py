"""Tables against golden texts, hostile text in them, and what figures draw."""
import csv
import io
import json
import math
import random
import shutil
import subprocess

import numpy as np
import pytest

from lab_lm.core.runs import Score
from lab_lm.evals.figures import confusion, confusion_figure, gap_figure, group_figure, layer_curves
from lab_lm.evals.tables import LATEX, MARKDOWN, Table, escaped, pivot, to_csv, to_frame, to_json, to_latex, to_markdown

SEED = random.randrange(2**31)
rng = np.random.default_rng(SEED)
ROWS = [{'system': 'bm25', 'set': 'हिन्दी', 'ndcg': Score(.5, 40, .4, .6), 'bpb': 1.2, 'n': 40, 'p': None},
        {'system': 'an_encoder', 'set': 'தமிழ்', 'ndcg': Score(.6449, 40, .5, .7), 'bpb': math.nan, 'n': 40, 'p': .0099},
        {'system': 'mixed & more', 'set': '', 'ndcg': Score(.6451, 40, .5, .7, {'majority': .3}, 'k=1'), 'bpb': -.0001, 'n': 38, 'p': .05}]
TABLE = Table(ROWS, best={'ndcg': 'max', 'bpb': 'min'}, p={'ndcg': 'p'}, against='against bm25', average='mean', digits=2, caption='100 % measured')

MARKDOWN_TEXT = r'''100 % measured

| system | set | ndcg | bpb | n |
| :-- | :-- | --: | --: | --: |
| bm25 | हिन्दी | 0.50 \[0.40, 0.60\] | 1.20 | 40 |
| an\_encoder | தமிழ் | 0.64\*\* \[0.50, 0.70\] | -- | 40 |
| mixed &amp; more |  | **0.65** \[0.50, 0.70\] | **0.00** | 38 |
| mean |  | 0.60 | -- |  |

\* p &lt; .05, \*\* p &lt; .01, \*\*\* p &lt; .001 (against bm25)'''

LATEX_TEXT = r'''\begin{table}[t]
\centering
\caption{100 \% measured}
\label{tab:one}
\begin{tabular}{llrrr}
\toprule
system & set & ndcg & bpb & n \\
\midrule
bm25 & हिन्दी & 0.50 {\scriptsize {[}0.40, 0.60{]}} & 1.20 & 40 \\
an\_encoder & தமிழ் & 0.64$^{**}$ {\scriptsize {[}0.50, 0.70{]}} & -- & 40 \\
mixed \& more &  & \textbf{0.65} {\scriptsize {[}0.50, 0.70{]}} & \textbf{0.00} & 38 \\
\midrule
mean &  & 0.60 & -- &  \\
\bottomrule
\end{tabular}
\par\smallskip{\footnotesize * p \textless{} .05, ** p \textless{} .01, *** p \textless{} .001 (against bm25)}
\end{table}
'''


def test_golden_texts():
    assert to_markdown(TABLE) == repr(TABLE) == TABLE._repr_markdown_() == MARKDOWN_TEXT
    assert to_latex(TABLE, 'tab:one') == LATEX_TEXT
    assert to_csv(TABLE) == ('"system","set","ndcg","ndcg low","ndcg high","ndcg n","bpb","n","p"\n"bm25","हिन्दी",0.5,0.4,0.6,40,1.2,40,""\n'
                             '"an_encoder","தமிழ்",0.6449,0.5,0.7,40,"",40,0.0099\n"mixed & more","",0.6451,0.5,0.7,40,-0.0001,38,0.05\n')
    back = json.loads(to_json(TABLE), parse_constant=lambda c: pytest.fail(c))
    assert back[1]['bpb'] is None and back[2]['ndcg'] == {'value': .6451, 'n': 40, 'low': .5, 'high': .7, 'baselines': {'majority': .3}, 'protocol': 'k=1'}
    frame = to_frame(TABLE)
    assert frame['ndcg'].tolist() == [.5, .6449, .6451] and frame['ndcg high'].tolist() == [.6, .7, .7] and frame.shape == (3, 9)


def test_the_best_is_bold_by_direction_and_over_what_was_measured():
    bold = lambda **how: [[cell.startswith('**') for cell in line.split(' | ')[1:]] for line in to_markdown(Table(**how)).split('\n')[2:]]
    rows = [{'task': 'a', 'x': .1, 'y': .9, 'z': None}, {'task': 'b', 'x': .3, 'y': .3, 'z': .2}]
    assert bold(rows=rows, best={'x': 'max', 'y': 'min', 'z': 'max'}) == [[False, False, False], [True, True, False]] # One value alone is not the best of anything
    assert bold(rows=rows, best='max') == [[False, True, False], [True, True, False]]
    assert bold(rows=rows, best='min', average='mean') == [[True, False, False], [False, False, True], [True, False, False]]
    assert bold(rows=[{'task': i, 'x': x} for i, x in enumerate((.12341, .12344, .1))], best={'x': 'max'}) == [[True], [True], [False]] # Alike as they are shown
    assert bold(rows=[{'task': 'a', 'n': 3}, {'task': 'b', 'n': 4}], best='max') == [[False], [False]] # Counts are no scores
    assert bold(rows=[{'task': 'a', 'x': np.float32(.5)}, {'task': 'b', 'x': np.float64(.25)}], best={'x': 'max'}) == [[True], [False]]
    for wrong, said in ((dict(best={'q': 'max'}), "no column 'q'"), (dict(p={'x': 'q'}), "no column 'q'"), (dict(best={'x': 'up'}), "given 'up'"), (dict(best='up'), "given 'up'")):
        with pytest.raises(ValueError, match=said): Table(rows, **wrong)


def test_marks_follow_p():
    for p, mark in ((None, ''), (.05, ''), (.0499, '*'), (.01, '*'), (.00999, '**'), (.001, '**'), (1e-9, '***'), (math.nan, '')):
        table = Table([{'s': 'a', 'x': .5, 'p': p}], p={'x': 'p'})
        assert f'| 0.500{escaped(mark, MARKDOWN)} |' in to_markdown(table) and f'0.500{f"$^{{{mark}}}$" if mark else ""} ' in to_latex(table), p
    assert 'p &lt;' not in to_markdown(Table([{'s': 'a', 'x': .5}]))


def test_odd_tables_are_defined():
    assert to_markdown(Table([])) == '(no rows)' and to_latex(Table([])).startswith('%') and json.loads(to_json(Table([]))) == [] and to_frame(Table([])).empty
    assert '| -- | 1 |' in to_markdown(Table([{'a': None, 'b': 1}])) and '∞' in to_markdown(Table([{'x': math.inf}])) and r'$-$$\infty$' in to_latex(Table([{'x': -math.inf}]))
    assert '| True | -0.500 |' in to_markdown(Table([{'ok': True, 'x': -.5}])) and '$-$0.500' in to_latex(Table([{'x': -.5}])) and '0.000' in to_markdown(Table([{'x': -.0001}]))
    assert [line.count('|') for line in to_markdown(Table([{'a': 1}, {'b': .5}])).split('\n')] == [3] * 4 # Rows with other keys: all columns, the missing ones --
    nan = Table([{'a': Score(math.nan, 0, 0, math.inf)}])
    assert '| -- |' in to_markdown(nan)
    assert pivot([], 'm', 't') == []
    with pytest.raises(ValueError, match='has no'): pivot([{'m': 1, 't': 2}], 'm', 't')


HOSTILE = ['\\', '\\\\', '|', '*', '_', '`', '$x$', '#', '%', '&', '{', '}', '~', '^', '[2]', ']', '<script>', '"', '\n', '\r', '\x00', '\u2028', '\t', '-', '--', '\\input{x}', 'कि', 'க்ஷ', '\u200d']


def test_hostile_text_stays_in_its_cell():
    for _ in range(60):
        text, other = (''.join(rng.choice(HOSTILE, rng.integers(1, 8))) for _ in 'ab')
        table = Table([{'name': text, 'x': .5}, {'name': other, 'x': .25}], best={'x': 'max'}, caption='a' + text, against=other + 'a')
        lines = to_markdown(table).split('\n')
        grid = [line for line in lines if line.startswith('| ')]
        assert len(lines) == 8 and len(grid) == 4, (SEED, text, other)
        bare = lambda line: line.replace('\\\\', '').replace('\\|', '')
        assert all(bare(line).count('|') == 3 for line in grid) and '<' not in to_markdown(table), (SEED, text)
        latex = to_latex(table)
        body = latex.split('\\midrule\n')[1].split('\\bottomrule')[0]
        assert len(body.splitlines()) == 2 and all(line.endswith(r' \\') and not line.startswith('[') for line in body.splitlines()), (SEED, text)
        for line in body.splitlines():
            inner = line[:-2]
            for command in (*LATEX.values(), r'\textbf'): inner = inner.replace(command, '') if len(command) > 2 else inner
            for c in '&%$#_{}': inner = inner.replace('\\' + c, '')
            inner = inner.replace('{0.500}', '')
            assert inner.count('&') == 1 and not set('\\%$#_{}~^[]|<>"') & set(inner), (SEED, text, line)
        assert list(csv.reader(io.StringIO(to_csv(table).replace('\x00', ''), newline='')))[1][1] == '0.5'


def test_latex_compiles_where_there_is_one(tmp_path):
    engine = shutil.which('xelatex') or shutil.which('lualatex')
    if not engine: pytest.skip('no xelatex or lualatex to compile with')
    rows = [{'name': ''.join(h for h in HOSTILE if h.isascii()), 'x': .5}]
    (tmp_path / 't.tex').write_text('\\documentclass{article}\\usepackage{booktabs}\\begin{document}' + to_latex(Table(rows)) + '\\end{document}', encoding='utf-8')
    assert subprocess.run([engine, '-interaction=nonstopmode', '-halt-on-error', 't.tex'], cwd=tmp_path, capture_output=True).returncode == 0


def test_confusion_counts_are_those_of_scikit_learn():
    from sklearn.metrics import confusion_matrix
    names = ['ने', 'को', 'से', 'में']
    true, guess = (rng.choice(names, 200).tolist() for _ in 'ab')
    counts, rows, columns = confusion(true, guess)
    assert rows == columns and sorted(rows) == sorted(names) and (counts == confusion_matrix(true, guess, labels=rows)).all()
    assert (confusion(true, guess, names)[0] == confusion_matrix(true, guess, labels=names)).all()
    few, kept, columns = confusion(true, [*guess[:-2], '', ''], most=3)
    assert few.sum() == 200 and kept[-1] == 'other' and columns[-1] == 'no guess' and few[:, -1].sum() == 2 and few.shape == (3, 4)
    assert [x.sum() for x in confusion([], [])[:1]] == [0]


def test_figures_draw_what_they_are_given():
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    score = lambda v, **base: Score(v, 9, v - .1, v + .1, base)
    ax = confusion_figure(['अ', 'अ', 'இ'], ['अ', 'இ', 'இ'])
    assert [t.get_text() for t in ax.texts] == ['.50', '.50', '', '1.00'] and ax.get_yticklabels()[0].get_text().endswith('(2)')
    ax = layer_curves({'case': [score(.5), None, score(.9)], 'tense': [.1, .2, .3]}, {'case': [.5, .5, .5]}, {'majority': .4})
    assert [line.get_label() for line in ax.lines] == ['case', 'case, control', 'tense', 'majority'] and np.isnan(ax.lines[0].get_ydata()[1]) and len(ax.collections) == 1
    gaps = {'a': [1., 2., -1., 0.], 'b': [math.nan, 3.], 'c': []}
    ax = gap_figure(gaps)
    assert [t.get_text().split()[-1] for t in ax.get_yticklabels()] == ['0.62', '1.00', '--']
    wrong = sum(p.get_height() for p in ax.patches if p.get_x() + p.get_width() <= 1e-9)
    right = sum(p.get_height() for p in ax.patches if p.get_x() >= -1e-9)
    assert right > wrong > 0
    ax = group_figure({'hi': {'a': score(.5, length=.4), 'b': None}, 'ta': {'a': score(.7, length=.6), 'b': score(.8)}})
    assert ax.get_legend_handles_labels()[1] == ['length', 'a', 'b'] and group_figure({}) is not None and gap_figure({}) is not None and gap_figure({'ties': [0., 0.]}).get_yticklabels()[0].get_text() == 'ties  0.50'
    plt.close('all')
