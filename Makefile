# make demo    run the main experiments on the shipped model, print their table and write their report
# make table TABLE=methods    run the missing experiments of another table, and print it
# make test    check and docs, then all tests except those that the next three commands run
# make test-browser    test reports in a headless Chromium, which is installed if missing (Debian, as root)
# make test-machines    test a store on NFS with emulated virtual machines (Debian, as root)
# make test-slurm    test sweeps on a SLURM whose nodes are namespaces of this machine (Debian, as root)
# make test-peers    test exports with the packages that read them, which are installed in outputs/peers
# make check   check lint, format, types, and the imports between packages
# make docs    build the documentation site in outputs/site, and fail where a link or a name is wrong
# make install    only set up .venv
# make drills  run at length tests of kills, full disks, damaged files, 10,000 configurations and kernels
# make audit   check licences and known vulnerabilities (from PyPI) of all installed packages
# make bench-gpu   measure models of published size with random weights on a GPU; writes outputs/benchmarks
# Each sets up .venv first if needed. PYTHON=/a/python chooses the interpreter, JOBS=4 the number of parallel jobs.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
JOBS ?= 2
CHROMIUM ?= chromium
BIN := .venv/bin
STAMP := .venv/installed

# One thread for each job: spinning threads of two jobs on two cores slow both down many times over.
export OMP_NUM_THREADS := 1

.PHONY: demo table test test-browser test-peers test-machines test-slurm check docs drills audit bench-gpu install
.DEFAULT_GOAL := demo

# Runs the experiments named after the table, writes the report, and ends with the table on one screen. A failed job is
# named there as missing.
demo: $(STAMP)
	@status=0; \
	$(BIN)/python -m pipelines.run -m experiment='glob(demo_*)' logger=wandb logger.group=demo progress=lines \
		hydra/launcher=joblib hydra.launcher.n_jobs=$(JOBS) hydra.launcher.batch_size=1 || status=$$?; \
	$(BIN)/python -m pipelines.report table=demo >/dev/null || status=$$?; \
	$(BIN)/python -m pipelines.table table=demo summary=true && exit $$status

table: $(STAMP)
	@$(BIN)/python -m pipelines.table table=$(TABLE) run_missing=true jobs=$(JOBS) 'overrides=["logger=wandb","logger.group=$(TABLE)"]'

test: check docs
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2

test-browser: $(STAMP)
	@command -v $(CHROMIUM) >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } || { \
		echo "Install Chromium, or name one: make test-browser CHROMIUM=/path/to/chrome"; exit 1; }
	CHROMIUM=$$(command -v $(CHROMIUM)) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/browser

test-peers: $(STAMP)
	@$(BIN)/python -m pip install -q --no-deps --upgrade --target outputs/peers -r tests/packed/targets/peers.txt
	PYTHONPATH=outputs/peers HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/packed/targets tests/packed/test_compressed_tensors.py

# Debian's kernel is unpacked for the virtual machines only, not installed.
test-machines: $(STAMP)
	@test -d outputs/machines/boot || { apt-get update -qq && \
		apt-get install -y -qq qemu-system-x86 busybox-static kmod cpio nfs-kernel-server nfs-common >/dev/null && \
		mkdir -p outputs/machines && cd outputs/machines && \
		apt-get download $$(apt-cache depends linux-image-amd64 | sed -n 's/.*Depends: //p') && \
		dpkg -x linux-image-*.deb . && rm linux-image-*.deb; }
	PATH=$$PATH:/usr/sbin:/sbin HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -v tests/machines

test-slurm: $(STAMP)
	@command -v slurmdbd >/dev/null || test -x /usr/sbin/slurmdbd || { apt-get update -qq && apt-get install -y -qq \
		--no-install-recommends slurmctld slurmd slurmdbd slurm-client munge mariadb-server >/dev/null; }
	PATH=$$PATH:/usr/sbin:/sbin HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -v tests/cluster

drills: $(STAMP)
	DRILLS=long HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 tests/faults tests/packed/test_integer_fuzz.py tests/packed/targets/test_damage.py

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

install: $(STAMP)

# Permissive licences and MPL. Exceptions: NVIDIA's libraries (dependencies of torch) have a licence of NVIDIA's, and
# torchao's metadata names none (it is BSD-3-Clause).
PERMISSIVE := MIT;Apache;BSD;Python Software Foundation;PSF;MPL;Mozilla;ISC
audit: $(STAMP)
	@test -x .audit/bin/pip-audit || { $(PYTHON) -m venv .audit && .audit/bin/python -m pip install -q pip-audit==2.10.1 pip-licenses==5.5.5; }
	@.audit/bin/pip-licenses --python $(BIN)/python --from=mixed --order=license --partial-match --allow-only="$(PERMISSIVE)" --ignore-packages \
		fp4dit torchao $$($(BIN)/python -m pip list --format=freeze | sed -n 's/^\(nvidia-[^=]*\|cuda-[^=]*\)==.*/\1/p')
	@.audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r constraints.txt || { \
		echo "The lines above are known vulnerabilities, or the reason why PyPI could not be asked for them."; exit 1; }

# Uses all cores, because one process at a time is measured.
bench-gpu: $(STAMP)
	env -u OMP_NUM_THREADS $(BIN)/python -m benchmarks.gpu
	env -u OMP_NUM_THREADS $(BIN)/python -m benchmarks.bench_packed
	env -u OMP_NUM_THREADS $(BIN)/python -m benchmarks.bench_training

# --no-deps: hpsv2 pins an old pytest and protobuf, which break other packages and are not needed here.
$(STAMP): pyproject.toml constraints.txt $(wildcard fp4dit/packed/nn/*.[ch])
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 was found. Install one, or name it: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { \
		echo "Could not make a virtual environment. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install -c constraints.txt -e '.[dev]' && \
	$(BIN)/python -m pip install -c constraints.txt --no-deps hpsv2==1.2.0 || { \
		echo; echo "The install failed; the error is above. It needs the package registry (see pip config list, and"; \
		echo "HTTPS_PROXY behind a proxy), about 6 GB of free disk, and Linux with Python 3.11-3.13. Then run make again:"; \
		echo "it goes on where it stopped. If .venv itself looks broken, delete it first: rm -rf .venv"; exit 1; }
	@touch $@
