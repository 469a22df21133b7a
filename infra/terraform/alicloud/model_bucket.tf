# The bucket checkpoints are read from: encrypted, no public access, only over TLS, in several zones.

resource "alicloud_oss_bucket" "models" {
  bucket          = var.model_bucket
  storage_class   = "Standard"
  redundancy_type = "ZRS"
  tags            = var.tags

  server_side_encryption_rule {
    sse_algorithm = "AES256"
  }

  versioning {
    status = "Enabled"
  }

  # A checkpoint is hundreds of gigabytes: an overwritten one is kept for a month, a broken upload for a week.
  lifecycle_rule {
    id      = "leftovers"
    enabled = true
    prefix  = ""

    noncurrent_version_expiration {
      days = 30
    }

    abort_multipart_upload {
      days = 7
    }
  }

  policy = jsonencode({
    Version = "1"
    Statement = [{
      Effect    = "Deny"
      Principal = ["*"]
      Action    = ["oss:*"]
      Resource  = ["acs:oss:*:*:${var.model_bucket}", "acs:oss:*:*:${var.model_bucket}/*"]
      Condition = { Bool = { "acs:SecureTransport" = ["false"] } }
    }]
  })
}

resource "alicloud_oss_bucket_public_access_block" "models" {
  bucket              = alicloud_oss_bucket.models.bucket
  block_public_access = true
}
