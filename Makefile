PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# some minutes on two cores: enough to see every output
EPOCHS ?= 6
# MONAI warns of every config, that it is code: this one is the bundle's own
export PYTHONWARNINGS ?= ignore:parsing config_file

.PHONY: install train explore test lint clean

install: $(VENV)/installed

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

train: install
	$(RUN) -m monai.bundle run training --config_file configs/train.json --epochs $(EPOCHS) \
		--augment False --learning_rate_decay 0.3

explore: install
	$(RUN) -m scripts.explore

test: install
	$(RUN) -m pytest

lint: install
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean:
	rm -rf $(VENV) output data cache eval
