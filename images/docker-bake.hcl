# docker buildx bake -f images/docker-bake.hcl            the CUDA runtime image and the MLflow server, loaded locally
# REGISTRY=... COMMIT=$(git rev-parse HEAD) docker buildx bake -f images/docker-bake.hcl --push
# docker buildx bake -f images/docker-bake.hcl runtime-cpu

variable "REGISTRY" { default = "spin-diffusion" }
variable "VERSION" { default = "0.1.0" }
variable "COMMIT" { default = "unknown" }
# Name it with its digest where builds must be repeatable to the byte.
variable "BASE_IMAGE" { default = "python:3.11.14-slim-bookworm" }

group "default" { targets = ["runtime", "mlflow"] }

target "common" {
  context   = "."
  platforms = ["linux/amd64"]
  args = {
    BASE_IMAGE = BASE_IMAGE
    VERSION    = VERSION
    COMMIT     = COMMIT
  }
}

target "runtime" {
  inherits   = ["common"]
  dockerfile = "images/runtime/Dockerfile"
  tags       = ["${REGISTRY}/runtime-python:${VERSION}"]
}

target "runtime-cpu" {
  inherits   = ["runtime"]
  args       = { TORCH_INDEX = "https://download.pytorch.org/whl/cpu" }
  tags       = ["${REGISTRY}/runtime-python:${VERSION}-cpu"]
}

target "mlflow" {
  inherits   = ["common"]
  dockerfile = "images/mlflow/Dockerfile"
  tags       = ["${REGISTRY}/mlflow:${VERSION}"]
}
