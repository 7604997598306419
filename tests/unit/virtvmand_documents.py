"""Domain XML as clients write it, for tests of what virtvmand makes of it."""

import pytest

from edgehold.api.vmand import Partition, State
from virtvmand.domxml import Definition, Plan, read_definition
from virtvmand.errors import Code, LibvirtError

UUID = "5fbd7c5e-3f2b-4b59-9d0d-2a7f1b1e7a11"

FULL = f"""<domain type='vman' id='7' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>full</name>
  <uuid>{UUID}</uuid>
  <title>A title</title>
  <description>Of
two lines</description>
  <metadata>
    <edgehold:partition xmlns:edgehold='urn:edgehold:partition:1' mode='shared' secure='yes' strict='yes' vsock='no'/>
    <app:any xmlns:app='urn:app'>kept</app:any>
  </metadata>
  <memory unit='MiB'>63</memory>
  <currentMemory unit='KiB'>64512</currentMemory>
  <vcpu current='3'>3</vcpu>
  <os>
    <type arch='aarch64'>hvm</type>
    <kernel>/boot/Image</kernel>
    <initrd>/boot/initrd</initrd>
    <cmdline>quiet root=/dev/vda console=ttyAMA0</cmdline>
    <dtb>/boot/board.dtb</dtb>
  </os>
  <cputune/>
  <clock offset='utc'/>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <disk type='block' device='disk' model='virtio'>
      <driver name='qemu' type='raw' cache='none'/>
      <source dev='/dev/mapper/data' startupPolicy='mandatory'/>
      <target dev='vdb' bus='virtio'/>
      <readonly/>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='/images/root.qcow2'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <interface type='bridge'>
      <mac address='52:54:00:AA:bb:01'/>
      <source bridge='br0'/>
      <model type='virtio'/>
      <link state='up'/>
    </interface>
    <serial type='pty'>
      <target type='system-serial' port='0'/>
    </serial>
    <console type='pty'>
      <target type='serial' port='0'/>
    </console>
    <channel type='unix'>
      <target type='virtio' name='org.qemu.guest_agent.0'/>
    </channel>
    <vsock model='virtio'>
      <cid auto='yes' address='3'/>
    </vsock>
  </devices>
</domain>
"""
"""Everything that has an effect, once at least."""

BARE = "<domain type='kvm'><name>bare</name><memory>32768</memory><os><type>hvm</type></os></domain>"
"""The least that is a domain."""

NOVA = """<domain type="kvm">
  <uuid>5fbd7c5e-3f2b-4b59-9d0d-2a7f1b1e7a11</uuid>
  <name>instance-00000007</name>
  <memory>524288</memory>
  <vcpu>2</vcpu>
  <metadata>
    <nova:instance xmlns:nova="http://openstack.org/xmlns/libvirt/nova/1.1">
      <nova:package version="26.2.2"/>
      <nova:name>edge-1</nova:name>
      <nova:creationTime>2024-05-06 07:08:09</nova:creationTime>
      <nova:flavor name="e1.small">
        <nova:memory>512</nova:memory>
        <nova:disk>4</nova:disk>
        <nova:swap>0</nova:swap>
        <nova:ephemeral>0</nova:ephemeral>
        <nova:vcpus>2</nova:vcpus>
      </nova:flavor>
      <nova:owner>
        <nova:user uuid="6431c3c8e24549f3a15201c4119688c9">admin</nova:user>
        <nova:project uuid="eedfb5a39c8b4118a145ba971cbe7305">admin</nova:project>
      </nova:owner>
      <nova:root type="image" uuid="9b0d1a14-f83e-446e-af2b-c7164c22e7ab"/>
      <nova:ports>
        <nova:port uuid="77c1dc00-af39-4463-bea0-12808f4bc340">
          <nova:ip type="fixed" address="10.0.0.4" ipVersion="4"/>
        </nova:port>
      </nova:ports>
    </nova:instance>
  </metadata>
  <sysinfo type="smbios">
    <system>
      <entry name="manufacturer">OpenStack Foundation</entry>
      <entry name="product">OpenStack Nova</entry>
      <entry name="version">26.2.2</entry>
      <entry name="serial">5fbd7c5e-3f2b-4b59-9d0d-2a7f1b1e7a11</entry>
      <entry name="uuid">5fbd7c5e-3f2b-4b59-9d0d-2a7f1b1e7a11</entry>
      <entry name="family">Virtual Machine</entry>
    </system>
  </sysinfo>
  <os>
    <type machine="q35">hvm</type>
    <kernel>/var/lib/nova/instances/5fbd7c5e-3f2b-4b59-9d0d-2a7f1b1e7a11/kernel</kernel>
    <initrd>/var/lib/nova/instances/5fbd7c5e-3f2b-4b59-9d0d-2a7f1b1e7a11/ramdisk</initrd>
    <cmdline>root=/dev/vda console=tty0 console=ttyS0 console=hvc0</cmdline>
    <boot dev="hd"/>
    <smbios mode="sysinfo"/>
  </os>
  <features>
    <acpi/>
    <apic/>
    <vmcoreinfo/>
  </features>
  <cputune>
    <shares>2048</shares>
  </cputune>
  <clock offset="utc"/>
  <cpu>
    <topology sockets="2" cores="1" threads="1"/>
  </cpu>
  <devices>
    <disk type="file" device="disk">
      <driver name="qemu" type="qcow2" cache="none"/>
      <source file="/var/lib/nova/instances/5fbd7c5e-3f2b-4b59-9d0d-2a7f1b1e7a11/disk"/>
      <target bus="virtio" dev="vda"/>
    </disk>
    <disk type="file" device="disk">
      <driver name="qemu" type="raw" cache="none"/>
      <source file="/var/lib/nova/instances/5fbd7c5e-3f2b-4b59-9d0d-2a7f1b1e7a11/disk.eph0"/>
      <target bus="virtio" dev="vdb"/>
    </disk>
    <interface type="bridge">
      <mac address="fa:16:3e:aa:bb:cc"/>
      <model type="virtio"/>
      <driver name="vhost" queues="2"/>
      <source bridge="brq3f1a2b4c-01"/>
      <mtu size="1450"/>
      <target dev="tap77c1dc00-af"/>
    </interface>
    <serial type="pty">
      <log file="/var/lib/nova/instances/5fbd7c5e-3f2b-4b59-9d0d-2a7f1b1e7a11/console.log" append="off"/>
    </serial>
    <controller type="usb" index="0" model="none"/>
    <controller type="pci" model="pcie-root"/>
    <controller type="pci" model="pcie-root-port"/>
    <channel type="unix">
      <source mode="bind" path="/var/lib/libvirt/qemu/org.qemu.guest_agent.0.instance-00000007.sock"/>
      <target type="virtio" name="org.qemu.guest_agent.0"/>
    </channel>
    <rng model="virtio">
      <backend model="random">/dev/urandom</backend>
    </rng>
    <memballoon model="virtio">
      <stats period="10"/>
    </memballoon>
  </devices>
</domain>
"""
"""What OpenStack's Nova writes: a kernel, images as files, a Linux bridge, cpu_mode=none, no VNC."""

VIRT_INSTALL = """<domain type="kvm">
  <name>installed</name>
  <uuid>0a8f2c1e-11d2-4a5b-8e0f-6f1f0c9d1b22</uuid>
  <metadata>
    <libosinfo:libosinfo xmlns:libosinfo="http://libosinfo.org/xmlns/libvirt/domain/1.0">
      <libosinfo:os id="http://debian.org/debian/12"/>
    </libosinfo:libosinfo>
  </metadata>
  <memory>1048576</memory>
  <currentMemory>1048576</currentMemory>
  <vcpu placement="static">2</vcpu>
  <os>
    <type arch="x86_64" machine="q35">hvm</type>
    <kernel>/boot/vmlinuz</kernel>
    <initrd>/boot/initrd.img</initrd>
    <cmdline>root=/dev/vda1 ro console=ttyS0</cmdline>
  </os>
  <features>
    <acpi/>
    <apic/>
  </features>
  <cpu mode="host-passthrough"/>
  <clock offset="utc">
    <timer name="rtc" tickpolicy="catchup"/>
    <timer name="pit" tickpolicy="delay"/>
    <timer name="hpet" present="no"/>
  </clock>
  <pm>
    <suspend-to-mem enabled="no"/>
    <suspend-to-disk enabled="no"/>
  </pm>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type="file" device="disk">
      <driver name="qemu" type="qcow2" discard="unmap"/>
      <source file="/var/lib/libvirt/images/installed.qcow2"/>
      <target dev="vda" bus="virtio"/>
    </disk>
    <controller type="usb" model="qemu-xhci" ports="15"/>
    <controller type="pci" model="pcie-root"/>
    <controller type="pci" model="pcie-root-port"/>
    <interface type="bridge">
      <source bridge="br0"/>
      <mac address="52:54:00:12:34:56"/>
      <model type="virtio"/>
    </interface>
    <console type="pty"/>
    <channel type="unix">
      <source mode="bind"/>
      <target type="virtio" name="org.qemu.guest_agent.0"/>
    </channel>
    <memballoon model="virtio"/>
    <rng model="virtio">
      <backend model="random">/dev/urandom</backend>
    </rng>
  </devices>
</domain>
"""
"""What ``virt-install --import --boot kernel=… --graphics none`` writes."""

DUMPED = """<domain type='kvm' id='12'>
  <name>dumped</name>
  <uuid>c1d0a3b2-77aa-4a3e-9a3c-0d5e6f708192</uuid>
  <memory unit='KiB'>262144</memory>
  <currentMemory unit='KiB'>262144</currentMemory>
  <vcpu placement='static'>1</vcpu>
  <resource>
    <partition>/machine</partition>
  </resource>
  <os>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <kernel>/boot/vmlinuz</kernel>
    <boot dev='hd'/>
  </os>
  <cpu mode='custom' match='exact' check='full'>
    <model fallback='forbid'>qemu64</model>
    <feature policy='require' name='x2apic'/>
  </cpu>
  <clock offset='utc'/>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='/images/a.img' index='1'>
        <seclabel model='dac' relabel='no'/>
      </source>
      <backingStore/>
      <target dev='vda' bus='virtio'/>
      <alias name='virtio-disk0'/>
      <address type='pci' domain='0x0000' bus='0x02' slot='0x00' function='0x0'/>
    </disk>
    <controller type='pci' index='0' model='pcie-root'>
      <alias name='pcie.0'/>
    </controller>
    <interface type='bridge'>
      <mac address='52:54:00:6b:3c:58'/>
      <source bridge='virbr0'/>
      <target dev='vnet3'/>
      <model type='virtio'/>
      <alias name='net0'/>
      <address type='pci' domain='0x0000' bus='0x01' slot='0x00' function='0x0'/>
    </interface>
    <serial type='pty'>
      <source path='/dev/pts/3'/>
      <target type='isa-serial' port='0'>
        <model name='isa-serial'/>
      </target>
      <alias name='ua-line'/>
    </serial>
    <console type='pty' tty='/dev/pts/3'>
      <source path='/dev/pts/3'/>
      <target type='serial' port='0'/>
      <alias name='ua-line'/>
    </console>
    <input type='mouse' bus='ps2'>
      <alias name='input0'/>
    </input>
    <audio id='1' type='none'/>
    <memballoon model='virtio'>
      <alias name='balloon0'/>
    </memballoon>
  </devices>
  <seclabel type='dynamic' model='dac' relabel='yes'>
    <label>+64055:+64055</label>
    <imagelabel>+64055:+64055</imagelabel>
  </seclabel>
</domain>
"""
"""What ``virsh dumpxml`` shows of a running guest of libvirt's own QEMU driver."""

DOCUMENTS = {"full": FULL, "nova": NOVA, "virt-install": VIRT_INSTALL, "dumped": DUMPED}


def plan(xml: str, **options: str) -> Plan:
    """What is asked of vmand."""
    return read_definition(xml, **options).plan


def replaced(was: str, becomes: str, xml: str = FULL) -> str:
    """A document with one difference."""
    assert was in xml
    return xml.replace(was, becomes, 1)


def refused(xml: str, code: Code = Code.CONFIG_UNSUPPORTED) -> str:
    """How a document is refused."""
    with pytest.raises(LibvirtError) as caught:
        read_definition(xml)
    assert caught.value.code is code, caught.value
    return str(caught.value)


def partition_of(definition: Definition, **changes: object) -> Partition:
    """The partition that vmand makes of it."""
    one = definition.plan
    fields: dict[str, object] = {
        "id": 4, "name": one.name, "uuid": one.uuid, "state": State.DEPLOYED, "mode": one.mode, "cores": one.cores,
        "memory_bytes": one.memory_bytes, "secure": one.secure, "strict": one.strict,
    }  # fmt: skip
    return Partition(**(fields | changes))  # type: ignore[arg-type]
