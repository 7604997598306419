/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * /dev/vmanager: hard partitions that a firmware keeps apart (its own cores, its own memory, its own kernel).
 *
 * One ABI for every driver below it. Rules, which hold for every structure here:
 *
 * - Fixed-width fields, no implicit padding, a multiple of 8 bytes: the same layout for 32-bit callers.
 * - `size` comes first and is what the caller knows of the structure. The driver never writes it, so that a structure
 *   can be used again. Less than the driver knows: the rest counts as zero, and nothing is written beyond it. More:
 *   the tail has to be zero, else E2BIG. Less than 8 bytes: EINVAL.
 * - Zero always means "none" or "default", so that a shorter structure asks for nothing by accident.
 * - An ioctl is known by its type and number alone. The size that is encoded in it changes when a structure grows and
 *   is not looked at; structures only grow at their end.
 * - An unknown flag or a reserved field that is not zero: EINVAL, and nothing was changed. An unknown ioctl: ENOTTY.
 * - What a driver can do is told by VMAN_CAP_*, never by a version. What it lacks: EOPNOTSUPP, and nothing was changed.
 * - Calls may wait, for the firmware or for a guest. Only a deadly signal interrupts them: EINTR is not returned.
 *   O_NONBLOCK concerns read(2) alone.
 * - Descriptors that are returned are close-on-exec.
 *
 * errno        when
 * EINVAL       unknown flag, reserved field, memory of 0 bytes or not aligned, core that the firmware does not hand out,
 *              name or command line that is malformed, image that is no regular file
 * E2BIG        newer structure with something in its tail
 * EFAULT       memory of the caller that can't be read or written
 * EOPNOTSUPP   without the capability
 * EEXIST       create: the id is taken
 * EBUSY        create: a core is taken. deploy: not READY. destroy: neither READY nor FAILED. any verb: state BUSY
 * EBADFD       every other verb that is not legal in this state
 * ENOSPC       no memory, no core or no partition is left; the images do not fit into the partition
 * EBADF        image: no descriptor, or not open for reading
 * ENOEXEC      image: empty, or not of its kind
 * ENOENT       no such id; next: no larger id
 * ENODEV       the partition of this descriptor is gone
 * ETIMEDOUT    shutdown: the guest did not obey in time and goes on; force may follow. Others: the firmware did not
 *              answer in time, the partition is FAILED
 * EIO          the firmware refused, the partition is FAILED; see vman_status.fw_code
 * ECANCELED    a forced shutdown or a reboot ended what this call was waiting for
 */
#ifndef _UAPI_LINUX_VMANAGER_H
#define _UAPI_LINUX_VMANAGER_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define VMAN_IOC		0xBE	/* 00-3F; free in Documentation/userspace-api/ioctl/ioctl-number.rst */
#define VMAN_ABI_VERSION	1

#define VMAN_NAME_LEN		32	/* with its NUL */
#define VMAN_UUID_LEN		16
#define VMAN_MAX_CPUS		256
#define VMAN_CPU_WORDS		(VMAN_MAX_CPUS / 64)
#define VMAN_MAX_CMDLINE	4096	/* bytes, without a NUL */
#define VMAN_MAX_ID		0x7fffffff

/* States of a partition, as __u32. NONE: does not exist, only in events. */
#define VMAN_STATE_NONE		0
#define VMAN_STATE_READY	1	/* cores and memory are reserved, no guest */
#define VMAN_STATE_DEPLOYED	2	/* the guest's CPUs run */
#define VMAN_STATE_SUSPENDED	3	/* CPUs parked, memory kept */
#define VMAN_STATE_BUSY		4	/* a verb is under way in the firmware */
#define VMAN_STATE_FAILED	5	/* the guest crashed or the firmware refused; shutdown leads to READY */

/* vman_info.caps */
#define VMAN_CAP_SECURE		(1ULL << 0)	/* partitions in the secure world */
#define VMAN_CAP_SUSPEND	(1ULL << 1)	/* suspend and restore */
#define VMAN_CAP_REBOOT		(1ULL << 2)	/* reboot */
#define VMAN_CAP_KEEP		(1ULL << 3)	/* partitions that outlive their maker's descriptor */
#define VMAN_CAP_EVENTS		(1ULL << 4)	/* read(2) and poll(2) */
#define VMAN_CAP_GENDTB		(1ULL << 5)	/* makes a device tree where none is given */
#define VMAN_CAP_SHUTDOWN	(1ULL << 6)	/* can ask a guest to power off; without it only by force */
#define VMAN_CAP_CLEARS		(1ULL << 7)	/* destroy clears the memory; without it VMAN_SCRUB is the caller's duty */

struct vman_info {			/* 96 bytes */
	__u32 size;
	__u32 abi;			/* out: VMAN_ABI_VERSION of the driver */
	__u64 caps;			/* out: VMAN_CAP_* */
	__u64 cpu_possible[VMAN_CPU_WORDS];	/* out: cores that partitions may get, taken or not */
	__u64 mem_total;		/* out: bytes of the carve-out */
	__u64 mem_free;			/* out: bytes; the largest piece may be smaller */
	__u64 mem_align;		/* out: bytes, a power of two */
	__u32 max_partitions;		/* out */
	__u32 num_partitions;		/* out */
	__u32 fw_version;		/* out: major << 16 | minor, 0: no firmware */
	__u32 backend;			/* out: 0 model, 1 SMC, 2 other */
	__u64 rsvd;			/* out: 0 */
};

/* vman_create.flags, and the same bits in vman_status.flags */
#define VMAN_CREATE_SECURE	(1ULL << 0)
#define VMAN_CREATE_CPUS_ANY	(1ULL << 1)	/* choose `ncpus` cores; cpu_mask has to be 0 and is a result */
#define VMAN_CREATE_KEEP	(1ULL << 2)	/* lives until destroy; else it ends by force with the open /dev/vmanager
						   that made it */
#define VMAN_CREATE_NOFD	(1ULL << 3)	/* return no descriptor (fd is -1) */
#define VMAN_CREATE_FLAGS	(15ULL)

struct vman_create {			/* 128 bytes */
	__u32 size;
	__u32 ncpus;			/* in: with CPUS_ANY, else 0; out: number of cores */
	__u64 flags;			/* in: VMAN_CREATE_* */
	__u64 memsize;			/* in: bytes, a multiple of mem_align */
	__u64 cpu_mask[VMAN_CPU_WORDS];	/* in and out */
	__u32 id;			/* in: 1 to VMAN_MAX_ID, or 0: the driver chooses; out: the X of /dev/vmanX */
	__s32 fd;			/* out: the partition's descriptor, or -1 */
	__u64 mem_base;			/* out: physical address */
	char name[VMAN_NAME_LEN];	/* in: a label, printable ASCII; may be empty */
	__u8 uuid[VMAN_UUID_LEN];	/* in: whose it is; kept as it is and shown by status */
	__u64 rsvd;			/* 0 */
};

struct vman_destroy {			/* 16 bytes */
	__u32 size;
	__u32 id;			/* in */
	__u32 flags;			/* 0 */
	__u32 rsvd;			/* 0 */
};

struct vman_open {			/* 16 bytes */
	__u32 size;
	__u32 id;			/* in */
	__s32 fd;			/* out */
	__u32 flags;			/* 0 */
};

struct vman_next {			/* 16 bytes */
	__u32 size;
	__u32 id;			/* in: any number, 0 to begin; out: the smallest larger id that exists */
	__u32 flags;			/* 0 */
	__u32 rsvd;			/* 0 */
};

/* Images are descriptors, never paths: opened with the rights of whoever asks. The driver reads them during the call
 * and keeps what a reboot needs. */
#define VMAN_IMG_KERNEL		0	/* needed */
#define VMAN_IMG_DTB		1	/* flattened device tree, with some slack at its end for the firmware */
#define VMAN_IMG_INITRD		2
#define VMAN_IMG_MAX		4	/* the fourth has no meaning yet and has to be absent */

#define VMAN_IMAGE_PRESENT	(1U << 0)	/* without it the whole vman_image has to be zero */

struct vman_image {			/* 32 bytes */
	__s32 fd;			/* a regular file or memfd, open for reading */
	__u32 flags;			/* VMAN_IMAGE_* */
	__u64 offset;			/* bytes into the file */
	__u64 len;			/* bytes, 0: to the end */
	__u64 load_addr;		/* 0: the driver decides */
};

#define VMAN_DEPLOY_GENDTB	(1ULL << 0)	/* make a device tree; VMAN_IMG_DTB has to be absent */

struct vman_deploy {			/* 160 bytes */
	__u32 size;
	__u32 timeout_ms;		/* for the firmware; 0: the driver's default */
	__u64 flags;			/* VMAN_DEPLOY_* */
	struct vman_image img[VMAN_IMG_MAX];
	__u64 cmdline_ptr;		/* address in the caller, 0 with a length of 0 */
	__u32 cmdline_len;		/* at most VMAN_MAX_CMDLINE; no NUL inside */
	__u32 rsvd;			/* 0 */
};

#define VMAN_SHUTDOWN_FORCE	(1U << 0)	/* shutdown: stop the CPUs at once, in any state but READY. It also ends
						   a shutdown that is waiting (which then succeeds) and a deploy or
						   reboot that is under way (ECANCELED) */
#define VMAN_REBOOT_OFF		(1U << 1)	/* reboot: also a READY partition that has been deployed: its last images
						   again */

struct vman_ctl {			/* 16 bytes: shutdown, reboot, suspend, restore, scrub */
	__u32 size;
	__u32 flags;			/* in: as above, others 0 */
	__u32 timeout_ms;		/* in: 0: the driver's default */
	__u32 state;			/* out: VMAN_STATE_* after the call. Written also where it ends in EBUSY, EBADFD,
					   ETIMEDOUT, EIO or ECANCELED */
};

#define VMAN_STATUS_DIRTY	(1ULL << 32)	/* a guest, maybe another's, was in this memory since it was cleared */

struct vman_status {			/* 152 bytes; all out */
	__u32 size;
	__u32 id;
	__u32 state;			/* VMAN_STATE_* */
	__u32 last_error;		/* why the last verb or the guest failed, as a positive errno (a crash:
					   ENOTRECOVERABLE); 0 after a success */
	__u64 flags;			/* VMAN_CREATE_* | VMAN_STATUS_* */
	__u64 memsize;			/* bytes */
	__u64 mem_base;
	__u64 cpu_mask[VMAN_CPU_WORDS];
	__u64 boot_count;		/* +1 at every start of a guest, reboots included */
	__u64 deployed_ns;		/* CLOCK_BOOTTIME of the last start, 0: never */
	__u64 generation;		/* +1 at every change of state and at every reboot */
	char name[VMAN_NAME_LEN];
	__u8 uuid[VMAN_UUID_LEN];
	__s64 fw_code;			/* what the firmware answered last (PSCI or SMC return value), 0: success */
};

/*
 * read(2): whole events, as many as there are and fit; EINVAL where not even one fits. On /dev/vmanager those of all
 * partitions, on a partition's descriptor its own, each time since the open. A reader steps by `size`. One that reads
 * too slowly finds an event with id 0 where some were lost, their number in `generation`: it has to look by itself.
 * poll(2) says POLLIN, and POLLHUP on the descriptor of a partition that is gone, where read then returns 0.
 */
struct vman_event {			/* 32 bytes */
	__u32 size;
	__u32 id;			/* 0: events were lost */
	__u32 old_state;		/* VMAN_STATE_NONE: it was created */
	__u32 new_state;		/* VMAN_STATE_NONE: it was destroyed */
	__u64 generation;
	__u64 time_ns;			/* CLOCK_BOOTTIME */
};

/* On /dev/vmanager: 00-1F */
#define VMAN_GET_INFO	_IOWR(VMAN_IOC, 0x00, struct vman_info)
#define VMAN_CREATE	_IOWR(VMAN_IOC, 0x01, struct vman_create)
#define VMAN_DESTROY	_IOW(VMAN_IOC, 0x02, struct vman_destroy)
#define VMAN_OPEN	_IOWR(VMAN_IOC, 0x03, struct vman_open)
#define VMAN_NEXT	_IOWR(VMAN_IOC, 0x04, struct vman_next)

/* On a partition's descriptor or /dev/vmanX: 20-3F (27-2F: statistics, 30-3F: doorbell and shared memory, later) */
#define VMAN_DEPLOY	_IOW(VMAN_IOC, 0x20, struct vman_deploy)
#define VMAN_SHUTDOWN	_IOWR(VMAN_IOC, 0x21, struct vman_ctl)
#define VMAN_REBOOT	_IOWR(VMAN_IOC, 0x22, struct vman_ctl)
#define VMAN_SUSPEND	_IOWR(VMAN_IOC, 0x23, struct vman_ctl)
#define VMAN_RESTORE	_IOWR(VMAN_IOC, 0x24, struct vman_ctl)
#define VMAN_STATUS	_IOWR(VMAN_IOC, 0x25, struct vman_status)
#define VMAN_SCRUB	_IOWR(VMAN_IOC, 0x26, struct vman_ctl)

#endif
