# make run    the five chapters on the samples, or on DATA=folder LANG=hi; ends with models/demo/report.html
# make test   everything that must hold
# make lab    JupyterLab on the chapters
# make bench  every benchmark, over an hour; BENCH="feed script" runs some
# Each of them makes the environment in .venv first, if it is missing or out of date.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# LANG is also the shell's locale: it names a language only when it is given on make's command line.
TEXT_LANG := $(if $(filter command,$(firstword $(origin LANG))),$(LANG))
override LANG := C.UTF-8
export LANG
export PYTHONUTF8 := 1

.PHONY: run test lab docs readme bench notebooks pins hooks clean

run: $(READY)
	$(BIN)/python -m lab_lm all $(if $(DATA),data="$(DATA)") $(if $(TEXT_LANG),lang=$(TEXT_LANG)) $(if $(NAME),name=$(NAME)) $(ARGS)

test: $(READY)
	$(BIN)/python tools/check.py $(STEPS)

lab: $(READY)
	$(BIN)/jupyter lab nbs

docs: $(READY)
	@command -v quarto >/dev/null || { echo "the site needs Quarto: https://quarto.org/docs/get-started"; exit 1; }
	$(BIN)/nbdev_docs

readme: $(READY)
	$(BIN)/python -c "import sys; sys.path.insert(0, 'tools'); import check; (check.ROOT / 'README.md').write_text(check.readme_text(check.ROOT), encoding='utf-8')"

notebooks: $(READY)
	$(BIN)/python tools/notebooks.py build

# The peers that our speed is measured against are installed for this only.
bench: $(READY)
	$(BIN)/python -m pip install --quiet datasketch datatrove orjson ftfy nltk indic-nlp-library "xxhash<4"
	for script in $(or $(BENCH:%=bench/%.py),$(wildcard bench/*.py)); do $(BIN)/python $$script || exit 1; done

hooks: $(READY)
	$(BIN)/nbdev_install_hooks

# The versions that belong together, for every Python from 3.10 on.
pins: $(READY)
	$(BIN)/pip install --quiet uv
	$(BIN)/python tools/pins.py

$(READY): settings.ini setup.py constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || { echo "lab_lm needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "Python's venv module is missing; on Debian and Ubuntu: sudo apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,sources,web,ray]"
	@touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info _proc _docs
