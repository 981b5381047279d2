# The service in an image: `docker compose up --build` uses it, see docker-compose.yml and ops/deploy.md.

ARG BASE=python:3.13.15-slim-trixie@sha256:7c61056e61ac89e852de05f3dc6fa51a6dd2181797bceed46aa725dd7cb2cd3b
# Of setup.py, separated by commas. With `local` the image has the bundled model server and its model.
ARG EXTRAS=redis

FROM ${BASE} AS build
ARG EXTRAS
WORKDIR /src
# Nothing comes from elsewhere but wheels of the versions, with the hashes, that are locked; of them what EXTRAS needs is
# installed. See ops/lock.sh.
COPY ops/requirements.lock ./
RUN pip download --quiet --no-cache-dir --disable-pip-version-check --require-hashes --no-deps --only-binary :all: \
    --requirement requirements.lock --dest /wheels
COPY setup.py pyproject.toml README.md ./
COPY ai_ticket ai_ticket
COPY twisted twisted
RUN python -m venv /opt/ai-ticket \
    && /opt/ai-ticket/bin/pip install --no-cache-dir --disable-pip-version-check --no-index --find-links /wheels \
    ".${EXTRAS:+[$EXTRAS]}"
# Twisted's list of plugins, which the service could not write.
RUN /opt/ai-ticket/bin/python -I -c "import twisted.plugin, twisted.application.service as service; \
    list(twisted.plugin.getPlugins(service.IServiceMaker))"
ENV XDG_CACHE_HOME=/var/cache
RUN mkdir -p /var/cache/ai-ticket \
    && case ",$EXTRAS," in *,local,*) /opt/ai-ticket/bin/ai-ticket fetch-model ;; esac

FROM ${BASE}
ARG EXTRAS
RUN case ",$EXTRAS," in *,local,*) \
        apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* ;; \
    esac
COPY --from=build /opt/ai-ticket /opt/ai-ticket
COPY --from=build /var/cache/ai-ticket /var/cache/ai-ticket
# The plain port is for the health check below and for a proxy in another container. It need not be published.
ENV PATH=/opt/ai-ticket/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    XDG_CACHE_HOME=/var/cache \
    HTTP_PORT=8080
# Where .env, ops/certs and ops/secrets are expected.
WORKDIR /srv/ai-ticket
USER 1000:1000
EXPOSE 8443 9464
# Without TLS, for the certificate need not name localhost. `degraded` (exit status 1) is not unhealthy: what is missing
# then is a model server, and to start this container again would not bring it back.
HEALTHCHECK --interval=15s --timeout=15s --start-period=30s --retries=3 \
    CMD ["sh", "-c", "ai-ticket health --timeout 10 --url http://localhost:${HTTP_PORT} || [ $? -eq 1 ]"]
CMD ["twistd", "--nodaemon", "--pidfile=", "ai-ticket"]
