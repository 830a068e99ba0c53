# The router's image, for two containers of one pod: vllm-router, and HAProxy before it (serving/front.cfg). Context: the
# repository's root (docker build -f serving/router.Dockerfile .). Apart from serving/Dockerfile, because this one starts
# on nodes without GPU in seconds and is what clients reach: neither vLLM nor torch is in it.
# ACR tasks build it without BuildKit, hence no RUN --mount and no COPY --chmod.
ARG PYTHON_IMAGE=public.ecr.aws/docker/library/python:3.12.15-slim-bookworm@sha256:54c85f3c47607a77f32adec749d3c81d1348bf25833671f512b26a9b6d778cb3
FROM ${PYTHON_IMAGE}

# dumb-init turns the kubelet's SIGTERM into HAProxy's signal for an orderly end. No versions: Debian keeps only the newest
# of a release, and the base image's digest says which release.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends dumb-init haproxy && rm -rf /var/lib/apt/lists/*

RUN groupadd --gid 10001 drydock \
 && useradd --uid 10001 --gid 10001 --home-dir /cache --create-home --shell /usr/sbin/nologin drydock

# Dependencies before code, so that a change of code leaves this layer as it is.
ARG REQUIREMENTS=requirements/router.lock
COPY ${REQUIREMENTS} /opt/drydock/requirements.lock
RUN python3 -m venv /opt/drydock/venv \
 && /opt/drydock/venv/bin/pip install --no-cache-dir --disable-pip-version-check --progress-bar off \
      --no-deps --require-hashes --only-binary :all: -r /opt/drydock/requirements.lock

# PYTHONPATH: the pod may choose its own working folder. PYTHONDONTWRITEBYTECODE: the root is mounted read-only.
ENV PATH=/opt/drydock/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/cache \
    XDG_CACHE_HOME=/cache
LABEL org.opencontainers.image.title="drydock router" \
      org.opencontainers.image.description="vllm-router, and HAProxy before it" \
      org.opencontainers.image.licenses="Apache-2.0"

WORKDIR /app
COPY LICENSE ./
COPY serving/__init__.py serving/router.py serving/front.cfg ./serving/

USER 10001:10001
# SIGTERM: the router ends its running requests. The other container: dumb-init --rewrite 15:10 haproxy -db -f ...
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "serving.router"]
