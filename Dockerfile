# The command miar with the weights of both models. The build needs a package index, a run needs no network:
#   docker build -t miar .
#   docker run --rm --network none --user "$(id -u):$(id -g)" -v "$PWD:/data" miar sr t2.nii.gz
FROM python:3.11-slim AS build

# PyTorch for CPUs; --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 is for NVIDIA GPUs
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

RUN python -m venv /opt/miar
ENV PATH=/opt/miar/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
RUN python -m pip install --no-cache-dir --no-deps --index-url "$TORCH_INDEX" --constraint constraints.txt torch
COPY LICENSE MANIFEST.in README.md pyproject.toml setup.cfg ./
COPY miar_monai ./miar_monai
COPY bundles ./bundles
RUN python -m pip install --no-cache-dir --constraint constraints.txt ".[demo]" ./bundles

FROM python:3.11-slim

COPY --from=build /opt/miar /opt/miar
# any user may run the image, so caches of libraries have to be where every user can write
ENV PATH=/opt/miar/bin:$PATH HOME=/tmp
RUN useradd --uid 1000 --no-create-home miar
USER 1000
# as Ctrl-C, since the first process of a container ignores the default, SIGTERM
STOPSIGNAL SIGINT
WORKDIR /data
ENTRYPOINT ["miar"]
CMD ["--help"]
