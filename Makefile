PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# four passes over the phantoms: enough to see every output, and to see the reconstructions begin to follow the scans
EPOCHS ?= 8

.PHONY: install train test lint clean

install: $(VENV)/installed

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

train: install
	$(RUN) -m monai.bundle run training --config_file configs/train.json --epochs $(EPOCHS)

test: install
	$(RUN) -m pytest

lint: install
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean:
	rm -rf $(VENV) output data
