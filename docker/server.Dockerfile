# Prefect's server alone: no torch, none of our code. The same Prefect as the workers', by the same argument.
FROM python:3.11.15-slim

ARG PREFECT
# The caps are pyproject.toml's: later ones stop the server from starting, or its scheduler from making runs.
RUN pip install --no-cache-dir "prefect==$PREFECT" "fastapi<0.151" "sqlalchemy<2.1" \
 && useradd --create-home --uid 10001 app \
 && install --directory --owner app /prefect

COPY with-secrets /usr/local/bin/
USER app
ENV PREFECT_HOME=/prefect PYTHONUNBUFFERED=1
ENTRYPOINT ["sh", "/usr/local/bin/with-secrets"]
