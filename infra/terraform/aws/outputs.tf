# What is needed to go on: a kubeconfig, a place to push the image and the checkpoint, and values for `helm install`.

output "kubeconfig_command" {
  description = "Makes kubectl and helm talk to the cluster."
  value       = "aws eks update-kubeconfig --region ${var.region} --name ${aws_eks_cluster.this.name}"
}

output "image_repository" {
  description = "Where to push the image of infra/docker."
  value       = aws_ecr_repository.image.repository_url
}

output "model_bucket" {
  description = "Where to put the checkpoint's folder."
  value       = aws_s3_bucket.models.bucket
}

output "redis_address" {
  description = "Redis with TLS; its password is redis_auth_token."
  value       = local.redis_address
}

output "model_reader_role_arn" {
  description = "The role of the chart's service accounts."
  value       = aws_iam_role.service_account["model-reader"].arn
}

output "cluster_autoscaler_role_arn" {
  description = "The role of the service account cluster-autoscaler in kube-system, for its chart."
  value       = aws_iam_role.service_account["cluster-autoscaler"].arn
}

output "node_pools" {
  description = "The node pools with the labels and taints their nodes carry."
  value = {
    for name, group in aws_eks_node_group.this : name => {
      labels    = group.labels
      taints    = [for taint in group.taint : "${taint.key}=${taint.value}:NoSchedule"]
      min_nodes = group.scaling_config[0].min_size
      max_nodes = group.scaling_config[0].max_size
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
