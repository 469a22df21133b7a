# What is needed to go on: a kubeconfig, a place to push the image and the checkpoint, and values for `helm install`.

output "kubeconfig_command" {
  description = "Writes a kubeconfig for kubectl and helm."
  value       = "aliyun cs GET /k8s/${alicloud_cs_managed_kubernetes.this.id}/user_config | jq -r .config > kubeconfig"
}

output "image_repository" {
  description = "Where nodes pull the image of infra/docker from. Pushing from outside needs the instance's public endpoint."
  value       = local.image_repository
}

output "model_bucket" {
  description = "Where to put the checkpoint's folder."
  value       = alicloud_oss_bucket.models.bucket
}

output "redis_address" {
  description = "Redis inside the network; its password is redis_password."
  value       = local.redis_address
}

output "model_reader_role" {
  description = "The role of the chart's service accounts."
  value       = alicloud_ram_role.model_reader.role_name
}

output "node_pools" {
  description = "The node pools with the labels and taints their nodes carry."
  value = {
    for name, pool in alicloud_cs_kubernetes_node_pool.this : name => {
      labels    = { for label in pool.labels : label.key => label.value }
      taints    = [for taint in pool.taints : "${taint.key}=${taint.value}:${taint.effect}"]
      min_nodes = pool.scaling_config[0].min_size
      max_nodes = pool.scaling_config[0].max_size
    }
  }
}

output "helm_values" {
  description = "Values for the chart: `terraform output -raw helm_values > cloud-values.yaml`."
  value       = yamlencode(local.helm_values)

  precondition {
    condition     = var.router_max <= local.gpus[var.router_pool] - (contains(var.expert_pools, var.router_pool) ? 1 : 0)
    error_message = "router_max: ${var.router_max} is too much for router_pool ${var.router_pool}, which has ${local.gpus[var.router_pool]} GPUs; where experts run there too, they need one at least."
  }
}
