# The ACK cluster (Pro, control plane managed). The chart's NetworkPolicies count only because Terway is told to enforce
# them, and pods get roles of their own only because RRSA is on.

locals {
  addons = {
    terway-eniip             = jsonencode({ NetworkPolicy = "true" })
    csi-plugin               = null
    csi-provisioner          = null
    ack-pod-identity-webhook = null
    # The chart's pods pull from the registry of registry.tf without a Secret of yours.
    managed-aliyun-acr-credential-helper = jsonencode({
      AcrInstanceInfo = [{ instanceId = alicloud_cr_ee_instance.this.id, regionId = var.region }]
      watchNamespace  = var.namespace
      serviceAccount  = "${var.release}-head,${var.release}-worker"
    })
  }
}

resource "alicloud_cs_managed_kubernetes" "this" {
  name                           = var.name
  cluster_spec                   = "ack.pro.small"
  version                        = var.kubernetes_version
  vswitch_ids                    = [for vswitch in alicloud_vswitch.nodes : vswitch.id]
  pod_vswitch_ids                = [for vswitch in alicloud_vswitch.pods : vswitch.id]
  service_cidr                   = var.service_cidr
  is_enterprise_security_group   = true
  new_nat_gateway                = false
  slb_internet_enabled           = var.api_public
  enable_rrsa                    = true
  encryption_provider_key        = var.secrets_key_id
  deletion_protection            = var.deletion_protection
  skip_set_certificate_authority = true
  control_plane_log_components   = ["apiserver", "kcm", "scheduler", "ccm"]
  control_plane_log_ttl          = "30"
  tags                           = var.tags

  dynamic "addons" {
    for_each = local.addons

    content {
      name   = addons.key
      config = addons.value
    }
  }

  # ACK would install one; the chart's Ingress leaves the choice to you.
  addons {
    name     = "nginx-ingress-controller"
    disabled = true
  }

  depends_on = [alicloud_snat_entry.nat]
}
