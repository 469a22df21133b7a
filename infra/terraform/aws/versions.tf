# What this module is run with. `.terraform.lock.hcl` is yours to commit beside your state's backend.

terraform {
  required_version = ">= 1.9"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 5.100"
    }
  }
}

provider "aws" {
  region = var.region

  default_tags {
    tags = merge(var.tags, { "expertscale.io/cluster" = var.name })
  }
}
