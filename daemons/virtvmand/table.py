"""The procedures of libvirt's remote program: number, name, layouts, and whether one changes something.

Facts of the wire (the same in libvirt 9.0 to 11.3); what is not here is answered as not supported. A handler has the
procedure's name (see `driver`).
"""

from dataclasses import dataclass

from virtvmand.xdr import Layout, layout


@dataclass(frozen=True, slots=True)
class Procedure:
    """One call, or with ``event`` a message that only the server sends (its layout then is ``returns``)."""

    number: int
    name: str
    takes: str
    gives: str
    changes: bool = False
    """A client that may only look is refused."""
    event: bool = False

    @property
    def arguments(self) -> Layout:
        return layout(self.takes)

    @property
    def returns(self) -> Layout:
        return layout(self.gives)


def _look(number: int, name: str, takes: str, gives: str) -> Procedure:
    return Procedure(number, name, takes, gives)


def _change(number: int, name: str, takes: str, gives: str) -> Procedure:
    return Procedure(number, name, takes, gives, changes=True)


def _event(number: int, name: str, gives: str) -> Procedure:
    return Procedure(number, name, "", gives, event=True)


_ALL = (
    # Session
    _look(66, "auth_list", "", "types:i32<20>"),
    _look(60, "connect_supports_feature", "feature:i32", "supported:i32"),
    _look(1, "connect_open", "name:str? flags:u32", ""),
    _look(2, "connect_close", "", ""),
    _look(110, "connect_get_uri", "", "uri:str"),
    _look(360, "connect_register_close_callback", "", ""),
    _look(361, "connect_unregister_close_callback", "", ""),
    _look(419, "connect_set_identity", "params:param<20> flags:u32", ""),
    # Host
    _look(3, "connect_get_type", "", "type:str"),
    _look(4, "connect_get_version", "", "hv_ver:u64"),
    _look(157, "connect_get_lib_version", "", "lib_ver:u64"),
    _look(59, "connect_get_hostname", "", "hostname:str"),
    _look(149, "connect_is_secure", "", "secure:i32"),
    _look(5, "connect_get_max_vcpus", "type:str?", "max_vcpus:i32"),
    _look(203, "connect_get_sysinfo", "flags:u32", "sysinfo:str"),
    _look(
        6, "node_get_info", "", "model:char[32] memory:u64 cpus:i32 mhz:i32 nodes:i32 sockets:i32 cores:i32 threads:i32"
    ),
    _look(7, "connect_get_capabilities", "", "capabilities:str"),
    _look(
        342,
        "connect_get_domain_capabilities",
        "emulatorbin:str? arch:str? machine:str? virttype:str? flags:u32",
        "capabilities:str",
    ),
    _look(293, "node_get_cpu_map", "need_map:i32 need_online:i32 flags:u32", "cpumap:opaque<2048> online:u32 ret:i32"),
    _look(227, "node_get_cpu_stats", "cpuNum:i32 nparams:i32 flags:u32", "params:node_stat<16> nparams:i32"),
    _look(228, "node_get_memory_stats", "nparams:i32 cellNum:i32 flags:u32", "params:node_stat<16> nparams:i32"),
    _look(102, "node_get_free_memory", "", "freeMem:u64"),
    _look(101, "node_get_cells_free_memory", "startCell:i32 maxcells:i32", "cells:u64<1024>"),
    _look(122, "node_get_security_model", "", "model:char<257> doi:char<257>"),
    _look(162, "connect_baseline_cpu", "xmlCPUs:str<256> flags:u32", "cpu:str"),
    _look(158, "connect_compare_cpu", "xml:str flags:u32", "result:i32"),
    # Find domains
    _look(273, "connect_list_all_domains", "need_results:i32 flags:u32", "domains:domain<16384> ret:u32"),
    _look(22, "domain_lookup_by_id", "id:i32", "dom:domain"),
    _look(23, "domain_lookup_by_name", "name:str", "dom:domain"),
    _look(24, "domain_lookup_by_uuid", "uuid:uuid", "dom:domain"),
    _look(51, "connect_num_of_domains", "", "num:i32"),
    _look(37, "connect_list_domains", "maxids:i32", "ids:i32<16384>"),
    _look(25, "connect_num_of_defined_domains", "", "num:i32"),
    _look(21, "connect_list_defined_domains", "maxnames:i32", "names:str<16384>"),
    # Ask a domain
    _look(212, "domain_get_state", "dom:domain flags:u32", "state:i32 reason:i32"),
    _look(16, "domain_get_info", "dom:domain", "state:u32 maxMem:u64 memory:u64 nrVirtCpu:u32 cpuTime:u64"),
    _look(14, "domain_get_xml_desc", "dom:domain flags:u32", "xml:str"),
    _look(150, "domain_is_active", "dom:domain", "active:i32"),
    _look(151, "domain_is_persistent", "dom:domain", "persistent:i32"),
    _look(202, "domain_is_updated", "dom:domain", "updated:i32"),
    _look(19, "domain_get_os_type", "dom:domain", "type:str"),
    _look(15, "domain_get_autostart", "dom:domain", "autostart:i32"),
    _look(449, "domain_get_autostart_once", "dom:domain", "autostart:i32"),
    _look(183, "domain_has_managed_save_image", "dom:domain flags:u32", "result:i32"),
    _look(426, "domain_get_messages", "dom:domain flags:u32", "msgs:str<2048>"),
    _look(229, "domain_get_control_info", "dom:domain flags:u32", "state:u32 details:u32 stateTime:u64"),
    _look(17, "domain_get_max_memory", "dom:domain", "memory:u64"),
    _look(18, "domain_get_max_vcpus", "dom:domain", "num:i32"),
    _look(200, "domain_get_vcpus_flags", "dom:domain flags:u32", "num:i32"),
    _look(20, "domain_get_vcpus", "dom:domain maxinfo:i32 maplen:i32", "info:vcpu<16384> cpumaps:opaque<8388608>"),
    _look(
        230,
        "domain_get_vcpu_pin_info",
        "dom:domain ncpumaps:i32 maplen:i32 flags:u32",
        "cpumaps:opaque<8388608> num:i32",
    ),
    _look(280, "domain_get_emulator_pin_info", "dom:domain maplen:i32 flags:u32", "cpumaps:opaque<8388608> ret:i32"),
    _look(159, "domain_memory_stats", "dom:domain maxStats:u32 flags:u32", "stats:memory_stat<1024>"),
    _look(
        262,
        "domain_get_cpu_stats",
        "dom:domain nparams:u32 start_cpu:i32 ncpus:u32 flags:u32",
        "params:param<2048> nparams:i32",
    ),
    # libvirt's own maximum is 16384: more memory and time than is good, and vmand has at most 1024 partitions.
    _look(344, "connect_get_all_domain_stats", "doms:domain<2048> stats:u32 flags:u32", "retStats:domain_stats<16384>"),
    _look(
        163,
        "domain_get_job_info",
        "dom:domain",
        "type:i32 timeElapsed:u64 timeRemaining:u64 dataTotal:u64 dataProcessed:u64 dataRemaining:u64 "
        "memTotal:u64 memProcessed:u64 memRemaining:u64 fileTotal:u64 fileProcessed:u64 fileRemaining:u64",
    ),
    _look(298, "domain_get_job_stats", "dom:domain flags:u32", "type:i32 params:param<64>"),
    _look(265, "domain_get_metadata", "dom:domain type:i32 uri:str? flags:u32", "metadata:str"),
    _look(187, "domain_snapshot_num", "dom:domain flags:u32", "num:i32"),
    _look(
        274,
        "domain_list_all_snapshots",
        "dom:domain need_results:i32 flags:u32",
        "snapshots:domain_snapshot<16384> ret:i32",
    ),
    _look(56, "domain_get_scheduler_type", "dom:domain", "type:str nparams:i32"),
    _look(223, "domain_get_scheduler_parameters_flags", "dom:domain nparams:i32 flags:u32", "params:param<16>"),
    _look(353, "domain_interface_addresses", "dom:domain source:u32 flags:u32", "ifaces:domain_interface<2048>"),
    _look(
        65,
        "domain_interface_stats",
        "dom:domain device:str",
        "rx_bytes:i64 rx_packets:i64 rx_errs:i64 rx_drop:i64 tx_bytes:i64 tx_packets:i64 tx_errs:i64 tx_drop:i64",
    ),
    _look(64, "domain_block_stats", "dom:domain path:str", "rd_req:i64 rd_bytes:i64 wr_req:i64 wr_bytes:i64 errs:i64"),
    _look(194, "domain_get_block_info", "dom:domain path:str flags:u32", "allocation:u64 capacity:u64 physical:u64"),
    _look(277, "domain_get_hostname", "dom:domain flags:u32", "hostname:str"),
    # Change a domain
    _change(11, "domain_define_xml", "xml:str", "dom:domain"),
    _change(350, "domain_define_xml_flags", "xml:str flags:u32", "dom:domain"),
    _change(10, "domain_create_xml", "xml_desc:str flags:u32", "dom:domain"),
    _change(9, "domain_create", "dom:domain", ""),
    _change(196, "domain_create_with_flags", "dom:domain flags:u32", "dom:domain"),
    _change(12, "domain_destroy", "dom:domain", ""),
    _change(234, "domain_destroy_flags", "dom:domain flags:u32", ""),
    _change(33, "domain_shutdown", "dom:domain", ""),
    _change(258, "domain_shutdown_flags", "dom:domain flags:u32", ""),
    _change(27, "domain_reboot", "dom:domain flags:u32", ""),
    _change(245, "domain_reset", "dom:domain flags:u32", ""),
    _change(34, "domain_suspend", "dom:domain", ""),
    _change(28, "domain_resume", "dom:domain", ""),
    _change(35, "domain_undefine", "dom:domain", ""),
    _change(231, "domain_undefine_flags", "dom:domain flags:u32", ""),
    _change(29, "domain_set_autostart", "dom:domain autostart:i32", ""),
    _change(450, "domain_set_autostart_once", "dom:domain autostart:i32", ""),
    _change(31, "domain_set_memory", "dom:domain memory:u64", ""),
    _change(204, "domain_set_memory_flags", "dom:domain memory:u64 flags:u32", ""),
    _change(32, "domain_set_vcpus", "dom:domain nvcpus:u32", ""),
    _change(199, "domain_set_vcpus_flags", "dom:domain nvcpus:u32 flags:u32", ""),
    _change(26, "domain_pin_vcpu", "dom:domain vcpu:u32 cpumap:opaque<2048>", ""),
    _change(225, "domain_pin_vcpu_flags", "dom:domain vcpu:u32 cpumap:opaque<2048> flags:u32", ""),
    _change(219, "domain_set_scheduler_parameters_flags", "dom:domain params:param<16> flags:u32", ""),
    _change(8, "domain_attach_device", "dom:domain xml:str", ""),
    _change(13, "domain_detach_device", "dom:domain xml:str", ""),
    _change(160, "domain_attach_device_flags", "dom:domain xml:str flags:u32", ""),
    _change(161, "domain_detach_device_flags", "dom:domain xml:str flags:u32", ""),
    _change(174, "domain_update_device_flags", "dom:domain xml:str flags:u32", ""),
    _change(264, "domain_set_metadata", "dom:domain type:i32 metadata:str? key:str? uri:str? flags:u32", ""),
    _change(338, "domain_set_time", "dom:domain seconds:i64 nseconds:u32 flags:u32", ""),
    _change(210, "domain_inject_nmi", "dom:domain flags:u32", ""),
    _change(358, "domain_rename", "dom:domain new_name:str? flags:u32", "retcode:i32"),
    _change(164, "domain_abort_job", "dom:domain", ""),
    _change(201, "domain_open_console", "dom:domain dev_name:str? flags:u32", ""),
    _change(296, "domain_open_channel", "dom:domain name:str? flags:u32", ""),
    # Events (MSG = server to client, type 2, serial 0)
    _look(316, "connect_domain_event_callback_register_any", "eventID:i32 dom:domain?", "callbackID:i32"),
    _look(317, "connect_domain_event_callback_deregister_any", "callbackID:i32", ""),
    _event(318, "domain_event_callback_lifecycle", "callbackID:i32 dom:domain event:i32 detail:i32"),
    _event(319, "domain_event_callback_reboot", "callbackID:i32 dom:domain"),
    _event(333, "domain_event_callback_device_removed", "callbackID:i32 dom:domain devAlias:str"),
    _event(367, "domain_event_callback_device_removal_failed", "callbackID:i32 dom:domain devAlias:str"),
    _event(363, "domain_event_callback_job_completed", "callbackID:i32 dom:domain params:param<64>"),
    _event(379, "domain_event_callback_metadata_change", "callbackID:i32 dom:domain type:i32 nsuri:str?"),
    _event(362, "connect_event_connection_closed", "reason:i32"),
    # Other object kinds that clients list (answer empty)
    _look(283, "connect_list_all_networks", "need_results:i32 flags:u32", "nets:network<16384> ret:u32"),
    _look(281, "connect_list_all_storage_pools", "need_results:i32 flags:u32", "pools:storage_pool<16384> ret:u32"),
    _look(284, "connect_list_all_interfaces", "need_results:i32 flags:u32", "ifaces:interface<16384> ret:u32"),
    _look(285, "connect_list_all_node_devices", "need_results:i32 flags:u32", "devices:node_device<65536> ret:u32"),
    _look(286, "connect_list_all_nwfilters", "need_results:i32 flags:u32", "filters:nwfilter<16384> ret:u32"),
    _look(287, "connect_list_all_secrets", "need_results:i32 flags:u32", "secrets:secret<16384> ret:u32"),
    _look(111, "node_num_of_devices", "cap:str? flags:u32", "num:i32"),
    _look(112, "node_list_devices", "cap:str? maxnames:i32 flags:u32", "names:str<65536>"),
    _look(126, "connect_num_of_interfaces", "", "num:i32"),
    _look(374, "connect_node_device_event_register_any", "eventID:i32 dev:node_device?", "callbackID:i32"),
    _look(380, "connect_secret_event_register_any", "eventID:i32 secret:secret?", "callbackID:i32"),
)
PROCEDURES = {one.number: one for one in _ALL}
NUMBERS = {one.name: one.number for one in _ALL}
BEFORE_OPEN = frozenset(
    NUMBERS[one]
    for one in ("auth_list", "connect_supports_feature", "connect_open", "connect_close", "connect_set_identity")
)
"""What a client may ask before it has opened anything."""
_SAVE = "a guest that is saved to a file: vman:///system can't do that; suspend keeps it in its memory"
_SNAPSHOTS = "snapshots: vman:///system can't do that"
_UNSUPPORTED = {
    53: "dumps of a guest's memory: vman:///system can't do that",
    54: _SAVE,
    55: _SAVE,
    182: _SAVE,
    184: _SAVE,
    185: _SNAPSHOTS,
    211: "a guest has no screen: its console is a serial line (virsh console)",
    226: "a guest has no keyboard: its console is a serial line (virsh console)",
}


def unsupported(number: int) -> str:
    """What a client is told that calls what is not in the table: the calls that people try have their reason."""
    return _UNSUPPORTED.get(number, f"vman:///system has no such call (procedure {number})")
