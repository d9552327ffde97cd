# `make demo` and `make test` work in a clean clone on a machine that has Python and nothing else: the environment is made first.
PYTHON ?= python3
VENV   ?= .venv
FASTAI ?= fastai
export PATH := $(abspath $(VENV))/bin:$(PATH)
export PYTHONWARNINGS = ignore
.PHONY: setup demo test fastai mutants docs bench readme prepare check release clean

setup: $(VENV)/.installed  ## make the environment

$(VENV)/.installed: settings.ini setup.py pyproject.toml
	$(PYTHON) -c "import sys; sys.exit('dmlfast needs Python 3.11 or later; this is '+sys.version.split()[0]+'. Name another one: make setup PYTHON=python3.12') if sys.version_info<(3,11) else 0"
	$(PYTHON) -m venv $(VENV)
	python -m pip install -q --upgrade pip
	python -m pip install -q -e '.[cpu,onnx,tune,dev,docs]'
	touch $@

demo: setup     ## train an embedding on characters, score it on characters it has never seen
	dmlfast-demo

test: setup     ## every notebook and everything in tests/
	python -m pytest -q -n 2 --dist loadfile tests/test_notebooks.py tests

fastai: setup   ## what leans on fastai, with its newest version or another: make fastai FASTAI=fastai==2.8.12
	python -m pip install -q -U "$(FASTAI)"
	python -m pytest -q tests/test_fastai.py
	python -m pytest -q tests/test_notebooks.py -k train/00_compat

mutants: setup  ## small mistakes in the hot paths, each of which the tests must find
	python tests/mutants.py

docs: setup     ## build the site into docs/_build/html
	python docs/nbsite.py

readme: setup   ## README.md from nbs/index.ipynb
	python docs/nbsite.py readme

bench: setup    ## speed and memory against other libraries
	for f in data doctor features full_scale interpret losses ranking retrieval; do python benchmarks/$$f.py; done

prepare: setup  ## before a commit: export, run the notebooks and store their outputs, clean, README
	nbdev-export
	python -m pytest -q tests/test_notebooks.py -k test_notebook --save
	python docs/pictures/tutorials.py
	nbdev-clean
	python docs/nbsite.py readme

check: setup    ## nothing generated is stale, and the site builds
	nbdev-export
	nbdev-clean
	python docs/nbsite.py readme
	python docs/readability.py
	git diff --exit-code && test -z "$$(git ls-files -o --exclude-standard)"
	python docs/nbsite.py

release: setup  ## build the archives and check them; upload with `twine upload dist/*`
	rm -rf dist build
	python -m build
	python -m twine check --strict dist/*

clean:          ## what was built, the environment excepted
	rm -rf _proc _docs dist build docs/_pages docs/_build *.egg-info
