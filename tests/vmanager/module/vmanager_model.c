// SPDX-License-Identifier: GPL-2.0
/*
 * /dev/vmanager and /dev/vmanX with a model of a firmware below (../model.h): the real system calls, descriptors and
 * device nodes, no partitions. For tests; load it into a machine of your own.
 */
#include <linux/anon_inodes.h>
#include <linux/cdev.h>
#include <linux/compat.h>
#include <linux/device.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/poll.h>
#include <linux/slab.h>
#include <linux/timekeeping.h>
#include <linux/uaccess.h>
#include <linux/version.h>
#include <linux/workqueue.h>

#include "model.h"

#define QUEUE 64

static unsigned long long caps = VMODEL_CAPS;
module_param(caps, ullong, 0444);
MODULE_PARM_DESC(caps, "VMAN_CAP_* of the model");
static unsigned long long cpus = VMODEL_CPUS;
module_param(cpus, ullong, 0444);
MODULE_PARM_DESC(cpus, "mask of the cores that partitions may get");

struct vman_file {
	struct vmodel_file model;
	struct list_head node;
	wait_queue_head_t events_wait;
	struct vman_event events[QUEUE];
	unsigned int first, count;
	u64 lost;
	bool ended;
};

/* One lock for the model and all queues: speed is no aim. */
static DEFINE_MUTEX(lock);
static struct vmodel model;
static LIST_HEAD(files);
static DECLARE_WAIT_QUEUE_HEAD(calls_wait);
static struct class *class;
static dev_t first_number;
static struct cdev nodes;

static void tick(struct work_struct *work);
static DECLARE_DELAYED_WORK(ticker, tick);

/* After everything that may have changed the model. */
static void settle(void)
{
	u64 now = ktime_get_boottime_ns(), due = vmodel_due(&model);

	wake_up_all(&calls_wait);
	if (due != VMODEL_NEVER)
		mod_delayed_work(system_wq, &ticker, due > now ? nsecs_to_jiffies(due - now) + 1 : 0);
}

static void tick(struct work_struct *work)
{
	mutex_lock(&lock);
	vmodel_tick(&model, ktime_get_boottime_ns());
	settle();
	mutex_unlock(&lock);
}

static void changed(const struct vmodel_partition *p, const struct vman_event *event)
{
	dev_t number = first_number + (p - model.partitions);
	struct vman_file *file;

	list_for_each_entry(file, &files, node) {
		if (file->model.serial && file->model.serial != p->serial)
			continue;
		if (file->model.serial && event->new_state == VMAN_STATE_NONE)
			file->ended = true;
		if (file->lost || file->count == QUEUE)
			file->lost++;
		else
			file->events[(file->first + file->count++) % QUEUE] = *event;
		wake_up_all(&file->events_wait);
	}
	if (event->old_state == VMAN_STATE_NONE)
		device_create(class, NULL, number, NULL, "vman%u", p->id);
	if (event->new_state == VMAN_STATE_NONE)
		device_destroy(class, number);
}

/* ---- files ---- */

static struct vman_file *new_file(u64 serial)
{
	struct vman_file *file = kzalloc(sizeof(*file), GFP_KERNEL);

	if (!file)
		return NULL;
	init_waitqueue_head(&file->events_wait);
	file->model.serial = serial;
	file->model.token = ++model.last_token;
	list_add_tail(&file->node, &files);
	return file;
}

static int manager_open(struct inode *inode, struct file *handle)
{
	mutex_lock(&lock);
	handle->private_data = new_file(0);
	mutex_unlock(&lock);
	return handle->private_data ? 0 : -ENOMEM;
}

static int partition_open(struct inode *inode, struct file *handle)
{
	u64 serial;
	int result = -ENODEV;

	mutex_lock(&lock);
	serial = model.partitions[iminor(inode)].serial;
	if (serial) {
		handle->private_data = new_file(serial);
		result = handle->private_data ? 0 : -ENOMEM;
	}
	mutex_unlock(&lock);
	return result;
}

static int vman_release(struct inode *inode, struct file *handle)
{
	struct vman_file *file = handle->private_data;

	mutex_lock(&lock);
	list_del(&file->node);
	if (!file->model.serial) {
		vmodel_closed(&model, &file->model, ktime_get_boottime_ns());
		settle();
	}
	mutex_unlock(&lock);
	kfree(file);
	return 0;
}

/* ---- events ---- */

static size_t next_event(struct vman_file *file, struct vman_event *event)
{
	if (file->count) {
		*event = file->events[file->first];
		file->first = (file->first + 1) % QUEUE;
		file->count--;
		return sizeof(*event);
	}
	if (file->lost) {
		*event = (struct vman_event){
			.size = sizeof(*event), .generation = file->lost, .time_ns = ktime_get_boottime_ns()};
		file->lost = 0;
		return sizeof(*event);
	}
	return 0;
}

static ssize_t vman_read(struct file *handle, char __user *to, size_t size, loff_t *position)
{
	struct vman_file *file = handle->private_data;
	struct vman_event event;
	ssize_t done = 0;
	int result;

	if (!(model.caps & VMAN_CAP_EVENTS))
		return -EOPNOTSUPP;
	if (size < sizeof(event))
		return -EINVAL;
	for (;;) {
		bool ended;

		mutex_lock(&lock);
		while (done + sizeof(event) <= size && next_event(file, &event)) {
			if (copy_to_user(to + done, &event, sizeof(event))) {
				mutex_unlock(&lock);
				return done ? done : -EFAULT;
			}
			done += sizeof(event);
		}
		ended = file->ended;
		mutex_unlock(&lock);
		if (done || ended)
			return done;
		if (handle->f_flags & O_NONBLOCK)
			return -EAGAIN;
		result = wait_event_interruptible(file->events_wait, file->count || file->lost || file->ended);
		if (result)
			return result;
	}
}

static __poll_t vman_poll(struct file *handle, poll_table *table)
{
	struct vman_file *file = handle->private_data;
	__poll_t mask = 0;

	poll_wait(handle, &file->events_wait, table);
	mutex_lock(&lock);
	if (model.caps & VMAN_CAP_EVENTS && (file->count || file->lost))
		mask |= EPOLLIN | EPOLLRDNORM;
	if (file->ended)
		mask |= EPOLLHUP | EPOLLIN | EPOLLRDNORM;
	mutex_unlock(&lock);
	return mask;
}

/* ---- calls ---- */

static int read_image(const struct vman_image *want, struct vmodel_image *image)
{
	struct fd fd = fdget(want->fd);
	loff_t position = want->offset;
	int result = 0;
	ssize_t length;
	u64 rest;

	if (!fd.file)
		return -EBADF;
	if (!(fd.file->f_mode & FMODE_READ)) {
		result = -EBADF;
	} else if (!S_ISREG(file_inode(fd.file)->i_mode)) {
		result = -EINVAL;
	} else {
		u64 size = i_size_read(file_inode(fd.file));

		rest = want->offset < size ? size - want->offset : 0;
		if (want->len > rest)
			result = -EINVAL;
		image->size = want->len ? want->len : rest;
		length = kernel_read(fd.file, image->head, min_t(u64, image->size, VMODEL_HEAD), &position);
		image->head_len = length > 0 ? length : 0;
	}
	fdput(fd);
	return result;
}

static int read_input(const struct vman_deploy *deploy, struct vmodel_input *input)
{
	int result = vmodel_check_deploy(deploy);

	for (int i = 0; !result && i < VMAN_IMG_MAX; i++)
		if (deploy->img[i].flags)
			result = read_image(&deploy->img[i], &input->image[i]);
	if (!result && copy_from_user(input->cmdline, u64_to_user_ptr(deploy->cmdline_ptr), deploy->cmdline_len))
		result = -EFAULT;
	return result;
}

/* A partition's descriptor that nobody sees yet; -errno. */
static int prepare_fd(const struct file_operations *operations, u64 serial, struct file **handle)
{
	struct vman_file *file = new_file(serial);
	int fd;

	if (!file)
		return -ENOMEM;
	fd = get_unused_fd_flags(O_CLOEXEC);
	*handle = fd < 0 ? ERR_PTR(fd) : anon_inode_getfile("[vman]", operations, file, O_RDWR);
	if (!IS_ERR(*handle))
		return fd;
	if (fd >= 0)
		put_unused_fd(fd);
	list_del(&file->node);
	kfree(file);
	return PTR_ERR(*handle);
}

/* Under the lock: the call itself, and the descriptor that it asks for. */
static int act(const struct file_operations *operations, struct vman_file *file, u32 nr, union vmodel_arg *arg,
	       const struct vmodel_input *input, struct vmodel_wait *wait, int *fd, struct file **opened)
{
	int result = vmodel_call(&model, &file->model, nr, arg, input, ktime_get_boottime_ns(), wait);
	struct vmodel_partition *p;

	if (result || file->model.serial)
		return result;
	if (nr == _IOC_NR(VMAN_CREATE) && !(arg->create.flags & VMAN_CREATE_NOFD)) {
		p = vmodel_by_id(&model, arg->create.id);
		arg->create.fd = *fd = prepare_fd(operations, p->serial, opened);
		if (*fd < 0)
			vmodel_remove(&model, p, ktime_get_boottime_ns());
	} else if (nr == _IOC_NR(VMAN_OPEN)) {
		arg->open.fd = *fd = prepare_fd(operations, vmodel_by_id(&model, arg->open.id)->serial, opened);
	} else {
		return 0;
	}
	return *fd < 0 ? *fd : 0;
}

static int wait_for(struct vmodel_wait *wait, union vmodel_arg *arg, bool tells_state)
{
	int result = wait_event_killable(calls_wait, READ_ONCE(wait->result) != -EINPROGRESS);

	mutex_lock(&lock); /* whoever answered is done with it */
	if (result)
		vmodel_forget(&model, wait);
	mutex_unlock(&lock);
	if (tells_state)
		arg->ctl.state = wait->state;
	return result ? result : wait->result;
}

static const struct file_operations partition_operations;

static long vman_ioctl(struct file *handle, unsigned int command, unsigned long address)
{
	struct vman_file *file = handle->private_data;
	const u32 nr = _IOC_NR(command);
	const struct vmodel_verb verb = vmodel_verb(file->model.serial != 0, nr);
	void __user *user = (void __user *)address;
	struct vmodel_input *input = NULL;
	struct vmodel_wait wait;
	struct file *opened = NULL;
	union vmodel_arg arg;
	int result, fd = -1;
	u32 size;

	if (_IOC_TYPE(command) != VMAN_IOC || !verb.size)
		return -ENOTTY;
	if (get_user(size, (u32 __user *)user))
		return -EFAULT;
	if (size < 8)
		return -EINVAL;
	if (size > PAGE_SIZE)
		return -E2BIG;
	result = copy_struct_from_user(&arg, verb.size, user, size);
	if (result)
		return result;
	if (file->model.serial && nr == _IOC_NR(VMAN_DEPLOY)) {
		input = kzalloc(sizeof(*input), GFP_KERNEL);
		if (!input)
			return -ENOMEM;
		result = read_input(&arg.deploy, input);
	}
	if (!result) {
		mutex_lock(&lock);
		result = act(&partition_operations, file, nr, &arg, input, &wait, &fd, &opened);
		settle();
		mutex_unlock(&lock);
	}
	kfree(input);
	if (result == -EINPROGRESS)
		result = wait_for(&wait, &arg, verb.writes == 2);
	if (vmodel_writes(verb, result) && copy_to_user(user, &arg, min(size, verb.size))) {
		if (!result && !file->model.serial && nr == _IOC_NR(VMAN_CREATE)) {
			mutex_lock(&lock);
			if (vmodel_by_id(&model, arg.create.id))
				vmodel_remove(&model, vmodel_by_id(&model, arg.create.id), ktime_get_boottime_ns());
			mutex_unlock(&lock);
		}
		result = -EFAULT;
	}
	if (opened && result) {
		put_unused_fd(fd);
		fput(opened);
	} else if (opened) {
		fd_install(fd, opened);
	}
	return result;
}

static const struct file_operations manager_operations = {
	.owner = THIS_MODULE,
	.open = manager_open,
	.release = vman_release,
	.read = vman_read,
	.poll = vman_poll,
	.unlocked_ioctl = vman_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.llseek = noop_llseek,
};

static const struct file_operations partition_operations = {
	.owner = THIS_MODULE,
	.open = partition_open,
	.release = vman_release,
	.read = vman_read,
	.poll = vman_poll,
	.unlocked_ioctl = vman_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.llseek = noop_llseek,
};

static struct miscdevice manager = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "vmanager",
	.fops = &manager_operations,
	.mode = 0600,
};

static int __init vman_init(void)
{
	int result;

	vmodel_init(&model, caps, cpus, changed);
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 4, 0)
	class = class_create("vman");
#else
	class = class_create(THIS_MODULE, "vman");
#endif
	if (IS_ERR(class))
		return PTR_ERR(class);
	result = alloc_chrdev_region(&first_number, 0, VMODEL_PARTITIONS, "vman");
	if (result)
		goto no_region;
	cdev_init(&nodes, &partition_operations);
	nodes.owner = THIS_MODULE;
	result = cdev_add(&nodes, first_number, VMODEL_PARTITIONS);
	if (result)
		goto no_nodes;
	result = misc_register(&manager);
	if (!result)
		return 0;
	cdev_del(&nodes);
no_nodes:
	unregister_chrdev_region(first_number, VMODEL_PARTITIONS);
no_region:
	class_destroy(class);
	return result;
}

static void __exit vman_exit(void)
{
	misc_deregister(&manager);
	cancel_delayed_work_sync(&ticker);
	for (int i = 0; i < VMODEL_PARTITIONS; i++)
		if (model.partitions[i].serial)
			device_destroy(class, first_number + i);
	cdev_del(&nodes);
	unregister_chrdev_region(first_number, VMODEL_PARTITIONS);
	class_destroy(class);
}

module_init(vman_init);
module_exit(vman_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("/dev/vmanager with a model of a firmware, for tests");
