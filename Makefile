# Two commands: `make reproduce` and `make test`. Each sets up what it needs, in .venv, on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread per process: results repeat to the last bit, and two processes on two cores do not starve each other.
export OMP_NUM_THREADS := 1

.PHONY: reproduce test test-all campaign slurm lab site readme notebooks clean

reproduce: $(VENV)/ready  ## every table and figure of the quick profile, from scratch, in reproduced/
	$(BIN)/ldrld reproduce --profile quick --jobs 2 --out reproduced
	$(BIN)/ldrld verify --profile quick --out reproduced
	$(BIN)/ldrld compare --profile quick --out reproduced

test: $(VENV)/ready  ## the checks that every change must pass
	$(BIN)/ruff check ldrld tests docs setup.py
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow"

test-all: $(VENV)/extras test  ## also every notebook, complete batches, killed processes, and the guides to other libraries
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m slow

campaign: $(VENV)/ready  ## more than fifty processes killed while batches run; the results must not differ (up to an hour)
	LDRLD_CAMPAIGN=1 $(BIN)/python -m pytest -s -m campaign tests/test_faults.py

slurm: $(VENV)/extras  ## a batch on a Slurm installed here (apt-get install slurm-wlm munge): ten pre-emptions, killed, drained
	LDRLD_CAMPAIGN=1 $(BIN)/python -m pytest -s -m campaign tests/test_slurm.py

# the server's folder is the whole project: the notebooks show its figures and link to its records
lab: $(VENV)/ready  ## read and run the notebooks
	$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs/index.ipynb \
		$(if $(filter 0,$(shell id -u)),--allow-root)

SITE := build/site
site: $(VENV)/extras  ## the web pages, from the notebooks' stored outputs, in build/site; needs no network
	$(BIN)/python docs/sources.py $(SITE)-source
	$(BIN)/sphinx-build -q -W --keep-going -j auto -c docs $(SITE)-source $(SITE)
	@echo "open $(SITE)/index.html"

readme: $(VENV)/ready  ## README.md from nbs/index.ipynb
	$(BIN)/jupyter nbconvert --log-level=ERROR --to markdown --no-input --output-dir . --output README nbs/index.ipynb
	sed -i -e "s,](\.\./,](,g" -e "s,](\([0-9a-z_/]*\.ipynb[^)]*\)),](nbs/\1),g" README.md
	cat -s README.md > README.md.tmp && mv README.md.tmp README.md  # hidden cells leave many blank lines

# notebooks about libraries that nothing else needs: each is run where they are installed
GUIDES := tutorials/hugging_face:transformers,accelerate tutorials/language_models:transformers,accelerate \
	tutorials/timm:timm tutorials/torchdistill:torchdistill tutorials/lightning:lightning \
	tutorials/export:onnx,onnxscript,onnxruntime models/timm_networks:timm
notebooks: $(VENV)/ready  ## export, run and clean all library notebooks, their outputs kept
	$(BIN)/nbdev_export
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace $(filter-out $(foreach guide,$(GUIDES),nbs/$(firstword $(subst :, ,$(guide))).ipynb) nbs/run/%,$(wildcard nbs/*.ipynb nbs/*/*.ipynb nbs/*/*/*.ipynb))
	for guide in $(GUIDES); do \
		$(BIN)/python -c "import ldrld.core.torchvision, $${guide#*:}" || continue; \
		$(BIN)/jupyter nbconvert --to notebook --execute --inplace nbs/$${guide%:*}.ipynb || exit 1; \
	done
	$(BIN)/nbdev_clean

$(VENV)/ready: requirements.txt settings.ini setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Python {v[0]}.{v[1]} is too old: 3.11 or newer is needed; say which with `make PYTHON=python3.11 ...`")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# the versions of requirements.txt stay: an extra that asked for another torch would end here
$(VENV)/extras: $(VENV)/ready requirements-extras.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-extras.txt -c requirements.txt
	@touch $@

clean:  ## what was made here: the environment and what `make reproduce` made; never records or data sets
	rm -rf $(VENV) reproduced build *.egg-info
