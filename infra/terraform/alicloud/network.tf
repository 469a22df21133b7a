# The network: per zone one vSwitch for nodes and one for pods (Terway gives pods addresses of their own), and one way out.

locals {
  zone_index = { for index, zone in var.zones : zone => index }
  # 10.42.0.0/16: nodes 10.42.0.0/20, .16.0/20 ...; pods 10.42.128.0/19, .160.0/19 ...
  node_cidrs = { for zone, index in local.zone_index : zone => cidrsubnet(var.vpc_cidr, 4, index) }
  pod_cidrs  = { for zone, index in local.zone_index : zone => cidrsubnet(var.vpc_cidr, 3, 4 + index) }
}

resource "alicloud_vpc" "this" {
  vpc_name   = var.name
  cidr_block = var.vpc_cidr
  tags       = var.tags
}

resource "alicloud_vswitch" "nodes" {
  for_each = local.node_cidrs

  vpc_id       = alicloud_vpc.this.id
  zone_id      = each.key
  cidr_block   = each.value
  vswitch_name = "${var.name}-nodes-${each.key}"
  tags         = var.tags
}

resource "alicloud_vswitch" "pods" {
  for_each = local.pod_cidrs

  vpc_id       = alicloud_vpc.this.id
  zone_id      = each.key
  cidr_block   = each.value
  vswitch_name = "${var.name}-pods-${each.key}"
  tags         = var.tags
}

resource "alicloud_nat_gateway" "this" {
  vpc_id           = alicloud_vpc.this.id
  vswitch_id       = alicloud_vswitch.nodes[var.zones[0]].id
  nat_gateway_name = var.name
  nat_type         = "Enhanced"
  payment_type     = "PayAsYouGo"
  tags             = var.tags
}

resource "alicloud_eip_address" "nat" {
  address_name         = "${var.name}-nat"
  bandwidth            = "100"
  internet_charge_type = "PayByTraffic"
  payment_type         = "PayAsYouGo"
  tags                 = var.tags
}

resource "alicloud_eip_association" "nat" {
  allocation_id = alicloud_eip_address.nat.id
  instance_id   = alicloud_nat_gateway.this.id
}

resource "alicloud_snat_entry" "nat" {
  for_each = merge(
    { for zone, vswitch in alicloud_vswitch.nodes : "nodes-${zone}" => vswitch.id },
    { for zone, vswitch in alicloud_vswitch.pods : "pods-${zone}" => vswitch.id },
  )

  snat_table_id     = alicloud_nat_gateway.this.snat_table_ids
  source_vswitch_id = each.value
  snat_ip           = alicloud_eip_address.nat.ip_address

  depends_on = [alicloud_eip_association.nat]
}
