//! Version documents, and the frozen list of extensions.

use axum::Json;
use axum::extract::Path;
use serde_json::{Value, json};

use super::call::Call;
use crate::http::{ApiError, App, RequestContext, Routes, Service};
use crate::policy::Rule;

pub fn routes(routes: Routes) -> Routes {
    routes
        .get("/", Rule::open(), versions)
        .get("/v2.1", Rule::open(), version)
        .get("/v2.1/", Rule::open(), version)
        .get(
            "/v2.1/extensions",
            Rule::reader("os_compute_api:extensions"),
            extensions,
        )
        .get(
            "/v2.1/extensions/{alias}",
            Rule::reader("os_compute_api:extensions"),
            extension,
        )
}

fn document(ctx: &RequestContext) -> Value {
    let (lowest, highest) = Service::Compute
        .microversions()
        .map_or_else(Default::default, |(from, to)| {
            (from.to_string(), to.to_string())
        });
    json!({
        "id": "v2.1",
        "status": "CURRENT",
        "version": highest,
        "min_version": lowest,
        "updated": "2013-07-23T11:33:21Z",
        "links": [{"rel": "self", "href": ctx.link("/v2.1/")}],
    })
}

async fn versions(
    axum::extract::State(_): axum::extract::State<App>,
    ctx: RequestContext,
) -> Json<Value> {
    Json(json!({"versions": [document(&ctx)]}))
}

async fn version(
    axum::extract::State(_): axum::extract::State<App>,
    ctx: RequestContext,
) -> Json<Value> {
    let mut document = document(&ctx);
    document["links"] = json!([
        {"rel": "self", "href": ctx.link("/v2.1/")},
        {"rel": "describedby", "type": "text/html", "href": "http://docs.openstack.org/"},
    ]);
    document["media-types"] = json!([{
        "base": "application/json",
        "type": "application/vnd.openstack.compute+json;version=2.1",
    }]);
    Json(json!({"version": document}))
}

/// What this cloud serves of nova's former extensions: alias and name. Clients look for `os-keypairs`
/// and its kin only at 2.1.
const EXTENSIONS: [(&str, &str, &str); 24] = [
    ("OS-DCF", "DiskConfig", "Disk Management Extension."),
    (
        "OS-EXT-AZ",
        "ExtendedAvailabilityZone",
        "Extended Availability Zone support.",
    ),
    (
        "OS-EXT-SRV-ATTR",
        "ExtendedServerAttributes",
        "Extended Server Attributes support.",
    ),
    ("OS-EXT-STS", "ExtendedStatus", "Extended Status support."),
    (
        "OS-FLV-DISABLED",
        "FlavorDisabled",
        "Support to show the disabled status of a flavor.",
    ),
    (
        "OS-FLV-EXT-DATA",
        "FlavorExtraData",
        "Provide additional data for flavors.",
    ),
    (
        "OS-SRV-USG",
        "ServerUsage",
        "Adds launched_at and terminated_at on Servers.",
    ),
    (
        "os-admin-actions",
        "AdminActions",
        "Enable admin-only server actions",
    ),
    (
        "os-availability-zone",
        "AvailabilityZone",
        "1. Add availability_zone to the Create Server API.",
    ),
    ("os-config-drive", "ConfigDrive", "Config Drive Extension."),
    (
        "os-console-output",
        "ConsoleOutput",
        "Console log output support, with tailing ability.",
    ),
    ("os-consoles", "Consoles", "Interactive Console support."),
    ("os-flavor-access", "FlavorAccess", "Flavor access support."),
    (
        "os-flavor-extra-specs",
        "FlavorExtraSpecs",
        "Flavors extra specs support.",
    ),
    (
        "os-flavor-manage",
        "FlavorManage",
        "Flavor create/delete API support.",
    ),
    (
        "os-hypervisors",
        "Hypervisors",
        "Admin-only hypervisor administration.",
    ),
    (
        "os-instance-actions",
        "InstanceActions",
        "View a log of actions and events taken on an instance.",
    ),
    ("os-keypairs", "Keypairs", "Keypair Support."),
    (
        "os-lock-server",
        "LockServer",
        "Enable lock/unlock server actions.",
    ),
    (
        "os-pause-server",
        "PauseServer",
        "Enable pause/unpause server actions.",
    ),
    ("os-quota-sets", "Quotas", "Quotas management support."),
    ("os-services", "Services", "Services support."),
    ("os-shelve", "Shelve", "Instance shelve mode."),
    (
        "os-suspend-server",
        "SuspendServer",
        "Enable suspend/resume server actions.",
    ),
];

fn view((alias, name, description): &(&str, &str, &str)) -> Value {
    json!({
        "alias": alias,
        "description": description,
        "links": [],
        "name": name,
        "namespace": "http://docs.openstack.org/compute/ext/fake_xml",
        "updated": "2014-12-03T00:00:00Z",
    })
}

async fn extensions(_: Call) -> Json<Value> {
    Json(json!({"extensions": EXTENSIONS.iter().map(view).collect::<Vec<_>>()}))
}

async fn extension(_: Call, Path(alias): Path<String>) -> Result<Json<Value>, ApiError> {
    let known = EXTENSIONS.iter().find(|(known, _, _)| *known == alias);
    let known = known.ok_or_else(super::call::gone)?;
    Ok(Json(json!({"extension": view(known)})))
}
