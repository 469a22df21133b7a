# Where the image of infra/docker lives: an ACR instance with one private repository, reached inside the network.
# ACR Enterprise Edition is a subscription: Terraform makes and renews it but cannot give it back.

resource "alicloud_cr_ee_instance" "this" {
  instance_name  = var.name
  instance_type  = var.registry_type
  payment_type   = "Subscription"
  period         = 1
  renewal_status = "AutoRenewal"
  renew_period   = 1
}

resource "alicloud_cr_ee_namespace" "this" {
  instance_id        = alicloud_cr_ee_instance.this.id
  name               = var.name
  auto_create        = false
  default_visibility = "PRIVATE"
}

resource "alicloud_cr_ee_repo" "image" {
  instance_id = alicloud_cr_ee_instance.this.id
  namespace   = alicloud_cr_ee_namespace.this.name
  name        = "expertscale"
  summary     = "ExpertScale with Ray, CPU and CUDA"
  repo_type   = "PRIVATE"
}

resource "alicloud_cr_vpc_endpoint_linked_vpc" "this" {
  instance_id                      = alicloud_cr_ee_instance.this.id
  vpc_id                           = alicloud_vpc.this.id
  vswitch_id                       = alicloud_vswitch.nodes[var.zones[0]].id
  module_name                      = "Registry"
  enable_create_dns_record_in_pvzt = true
}

locals {
  image_path       = "${var.region}.cr.aliyuncs.com/${alicloud_cr_ee_namespace.this.name}/${alicloud_cr_ee_repo.image.name}"
  image_repository = "${alicloud_cr_ee_instance.this.instance_name}-registry-vpc.${local.image_path}"
}
