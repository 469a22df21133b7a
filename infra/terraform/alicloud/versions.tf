# What this module is run with. `.terraform.lock.hcl` is yours to commit beside your state's backend.

terraform {
  required_version = ">= 1.9"

  required_providers {
    alicloud = {
      source  = "aliyun/alicloud"
      version = ">= 1.283.0, < 2.0.0"
    }
  }
}

provider "alicloud" {
  region = var.region
}
