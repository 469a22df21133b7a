# Who may do what. Nodes have a role without any policy; pods of the chart may read models, by RRSA: a role that only their
# service accounts, in this cluster, can take. ACK's own components use the roles that ACK asks you to authorise once.

resource "alicloud_ram_role" "node" {
  role_name   = "${var.name}-node"
  description = "Nodes of ${var.name}; nothing is allowed to it"

  assume_role_policy_document = jsonencode({
    Version = "1"
    Statement = [{
      Effect    = "Allow"
      Action    = "sts:AssumeRole"
      Principal = { Service = ["ecs.aliyuncs.com"] }
    }]
  })
}

resource "alicloud_ram_role" "model_reader" {
  role_name   = "${var.name}-model-reader"
  description = "Pods of the release ${var.release} in namespace ${var.namespace}"

  assume_role_policy_document = jsonencode({
    Version = "1"
    Statement = [{
      Effect    = "Allow"
      Action    = "sts:AssumeRole"
      Principal = { Federated = [alicloud_cs_managed_kubernetes.this.rrsa_metadata[0].ram_oidc_provider_arn] }
      Condition = {
        StringEquals = {
          "oidc:iss" = [alicloud_cs_managed_kubernetes.this.rrsa_metadata[0].rrsa_oidc_issuer_url]
          "oidc:aud" = ["sts.aliyuncs.com"]
          "oidc:sub" = [for pod in ["head", "worker"] : "system:serviceaccount:${var.namespace}:${var.release}-${pod}"]
        }
      }
    }]
  })
}

resource "alicloud_ram_policy" "model_reader" {
  policy_name = "${var.name}-read-models"
  description = "Read the checkpoints of ${var.name}"

  policy_document = jsonencode({
    Version = "1"
    Statement = [
      { Effect = "Allow", Action = ["oss:ListObjects"], Resource = ["acs:oss:*:*:${var.model_bucket}"] },
      { Effect = "Allow", Action = ["oss:GetObject"], Resource = ["acs:oss:*:*:${var.model_bucket}/*"] },
    ]
  })
}

resource "alicloud_ram_role_policy_attachment" "model_reader" {
  role_name   = alicloud_ram_role.model_reader.role_name
  policy_name = alicloud_ram_policy.model_reader.policy_name
  policy_type = "Custom"
}
