# Who may do what. Nodes may join and pull images; everything else belongs to named service accounts (IRSA), never to a
# node. Policies are written with jsonencode, so that the tests can read them.

data "aws_partition" "current" {}

data "aws_caller_identity" "current" {}

locals {
  managed_policy = "arn:${data.aws_partition.current.partition}:iam::aws:policy"
  oidc_issuer    = trimprefix(aws_eks_cluster.this.identity[0].oidc[0].issuer, "https://")

  service_accounts = {
    model-reader       = [for pod in ["head", "worker"] : "${var.namespace}:${var.release}-${pod}"]
    cluster-autoscaler = ["kube-system:cluster-autoscaler"]
    ebs-csi            = ["kube-system:ebs-csi-controller-sa"]
    vpc-cni            = ["kube-system:aws-node"]
  }
}

resource "aws_iam_role" "cluster" {
  name_prefix        = "${var.name}-cluster-"
  assume_role_policy = jsonencode(local.assumed_by["eks"])
}

resource "aws_iam_role_policy_attachment" "cluster" {
  role       = aws_iam_role.cluster.name
  policy_arn = "${local.managed_policy}/AmazonEKSClusterPolicy"
}

resource "aws_iam_role" "node" {
  name_prefix        = "${var.name}-node-"
  assume_role_policy = jsonencode(local.assumed_by["ec2"])
}

resource "aws_iam_role_policy_attachment" "node" {
  for_each = toset(["AmazonEKSWorkerNodePolicy", "AmazonEC2ContainerRegistryPullOnly"])

  role       = aws_iam_role.node.name
  policy_arn = "${local.managed_policy}/${each.value}"
}

locals {
  assumed_by = {
    for service in ["eks", "ec2"] : service => {
      Version = "2012-10-17"
      Statement = [{
        Effect    = "Allow"
        Action    = service == "eks" ? ["sts:AssumeRole", "sts:TagSession"] : ["sts:AssumeRole"]
        Principal = { Service = "${service}.amazonaws.com" }
      }]
    }
  }
}

resource "aws_iam_openid_connect_provider" "cluster" {
  url            = aws_eks_cluster.this.identity[0].oidc[0].issuer
  client_id_list = ["sts.amazonaws.com"]
}

resource "aws_iam_role" "service_account" {
  for_each = local.service_accounts

  name_prefix = "${var.name}-${each.key}-"

  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Action    = "sts:AssumeRoleWithWebIdentity"
      Principal = { Federated = aws_iam_openid_connect_provider.cluster.arn }
      Condition = {
        StringEquals = {
          "${local.oidc_issuer}:sub" = [for account in each.value : "system:serviceaccount:${account}"]
          "${local.oidc_issuer}:aud" = "sts.amazonaws.com"
        }
      }
    }]
  })
}

resource "aws_iam_role_policy" "model_reader" {
  name = "read-models"
  role = aws_iam_role.service_account["model-reader"].name

  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      { Effect = "Allow", Action = "s3:ListBucket", Resource = aws_s3_bucket.models.arn },
      { Effect = "Allow", Action = "s3:GetObject", Resource = "${aws_s3_bucket.models.arn}/*" },
      { Effect = "Allow", Action = "kms:Decrypt", Resource = aws_kms_key.models.arn },
    ]
  })
}

# EC2's and Auto Scaling's Describe calls know no resources; what changes something is bound to this cluster's groups.
resource "aws_iam_role_policy" "cluster_autoscaler" {
  name = "scale-node-groups"
  role = aws_iam_role.service_account["cluster-autoscaler"].name

  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      {
        Effect = "Allow"
        Action = [
          "autoscaling:DescribeAutoScalingGroups",
          "autoscaling:DescribeAutoScalingInstances",
          "autoscaling:DescribeLaunchConfigurations",
          "autoscaling:DescribeScalingActivities",
          "ec2:DescribeImages",
          "ec2:DescribeInstanceTypes",
          "ec2:DescribeLaunchTemplateVersions",
          "ec2:GetInstanceTypesFromInstanceRequirements",
        ]
        Resource = "*"
      },
      {
        Effect   = "Allow"
        Action   = "eks:DescribeNodegroup"
        Resource = "arn:${data.aws_partition.current.partition}:eks:${var.region}:${data.aws_caller_identity.current.account_id}:nodegroup/${var.name}/*"
      },
      {
        Effect    = "Allow"
        Action    = ["autoscaling:SetDesiredCapacity", "autoscaling:TerminateInstanceInAutoScalingGroup"]
        Resource  = "*"
        Condition = { StringEquals = { "aws:ResourceTag/k8s.io/cluster-autoscaler/${var.name}" = "owned" } }
      },
    ]
  })
}

resource "aws_iam_role_policy_attachment" "ebs_csi" {
  role       = aws_iam_role.service_account["ebs-csi"].name
  policy_arn = "${local.managed_policy}/service-role/AmazonEBSCSIDriverPolicy"
}

resource "aws_iam_role_policy_attachment" "vpc_cni" {
  role       = aws_iam_role.service_account["vpc-cni"].name
  policy_arn = "${local.managed_policy}/AmazonEKS_CNI_Policy"
}
