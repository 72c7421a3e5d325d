# The installation of README.md in an image; nothing runs as root in it. For a machine without an NVIDIA GPU, and with one:
#   docker build -t engine .
#   docker build -t engine --build-arg BASE=nvidia/cuda:13.0.2-base-ubuntu24.04 --build-arg TORCH="torch torchvision" .
#   docker run --rm -it --gpus all --user "$(id -u):$(id -g)" -v "$PWD:/work" engine train --method at --dataset digits
ARG BASE=debian:bookworm-slim
FROM ${BASE}
ARG TORCH="torch torchvision --index-url https://download.pytorch.org/whl/cpu"

# g++ and Python's headers also compile what Triton and torch.compile generate.
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends \
    ca-certificates cmake g++ ninja-build python3-dev python3-venv && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/engine
RUN python3 -m venv .venv
ENV PATH=/opt/engine/.venv/bin:$PATH PIP_NO_CACHE_DIR=1
RUN pip install ${TORCH}
COPY . .
RUN pip install -e '.[export]'

# What the engine and its compilers keep; mount a volume here to keep it between containers.
RUN mkdir /cache && chmod 1777 /cache
ENV HOME=/cache
WORKDIR /work
ENTRYPOINT ["engine"]
