//! The compute API: routes, bodies, views. Each file is one resource; nothing here changes a server
//! but through [`super::ops`].

mod actions;
mod addresses;
mod call;
mod consoles;
mod evacuate;
mod flavors;
mod hosts;
mod hypervisors;
mod images;
mod instance_actions;
mod keypairs;
pub mod migrations;
mod quotas;
mod resize;
pub mod schemas;
mod servers;
mod shelve;
mod usages;
mod versions;

use crate::event::Origin;
use crate::http::{Routes, Service};

/// All endpoints of compute.
pub fn routes() -> Routes {
    let routes = Routes::new(Service::Compute);
    let routes = versions::routes(routes);
    let routes = flavors::routes(routes);
    let routes = keypairs::routes(routes);
    let routes = servers::routes(routes);
    let routes = actions::routes(routes);
    let routes = addresses::routes(routes);
    let routes = consoles::routes(routes);
    let routes = instance_actions::routes(routes);
    let routes = hosts::routes(routes);
    let routes = hypervisors::routes(routes);
    let routes = usages::routes(routes);
    let routes = migrations::routes(routes);
    quotas::routes(routes)
}

/// Who asked, for operations and events.
fn origin(call: &call::Call) -> Origin {
    Origin {
        request_id: Some(call.ctx.request_id().to_owned()),
        user_id: Some(call.caller.user_id.clone()),
        project_id: call.caller.project_id().map(str::to_owned),
    }
}
