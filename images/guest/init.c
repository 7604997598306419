// SPDX-License-Identifier: Apache-2.0
/*
 * PID 1 of the small guest: loads the drivers, listens to the power button, starts the job, and then sleeps.
 *
 * A program and not a shell script, because under emulation every fork counts, and because the power button must have
 * a reader before the "up" line: a press that nobody reads is lost. It polls nothing: without a job the guest is idle.
 *
 * Kernel command line (see README.md): edgehold.job_ms, edgehold.period_ms, edgehold.panic_s, edgehold.shell,
 * edgehold.hog
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/input.h>
#include <linux/netlink.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#ifdef __aarch64__
#define SERIAL "ttyAMA0"
#else
#define SERIAL "ttyS0"
#endif
#define CONSOLE "/dev/" SERIAL
#define MODULE_LIST "/etc/modules"
#define MAX_BUTTONS 8
#define DEFAULT_PERIOD_MS "100"
/* A shell that ends sooner than this is not started again at once: its terminal is probably gone. */
#define SHELL_MIN_S 1

struct shell {
	const char *tty;
	pid_t pid;
	time_t started;
	int refused;
};

static int console = -1;
static char cmdline[4096];
static struct shell shells[] = {{.tty = "/dev/hvc0"}, {.tty = NULL}};
static pid_t job_pid;

/* One line on the console by one write(2). */
static __attribute__((format(printf, 1, 2))) void say(const char *format, ...)
{
	char line[256];
	va_list args;
	int length;

	va_start(args, format);
	length = vsnprintf(line, sizeof(line) - 1, format, args);
	va_end(args);
	if (length < 0)
		return;
	if (length > (int)sizeof(line) - 2)
		length = (int)sizeof(line) - 2;
	line[length] = '\n';
	if (write(console, line, (size_t)length + 1) < 0)
		return; /* a guest without a console still runs its job */
}

static time_t uptime_s(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_BOOTTIME, &ts);
	return ts.tv_sec;
}

static void write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);

	if (fd < 0 || write(fd, text, strlen(text)) < 0)
		say("edgehold-guest warning %s: %s", path, strerror(errno));
	if (fd >= 0)
		close(fd);
}

/* The value of `name` on the kernel command line (the last one counts), or NULL. */
static const char *option(const char *name)
{
	static char values[8][64];
	static int used;
	const char *found = NULL;
	size_t length = strlen(name);

	for (const char *p = cmdline; *p;) {
		size_t word = strcspn(p, " \n");

		if (word > length && strncmp(p, name, length) == 0 && p[length] == '=') {
			char *value = values[used % 8];

			snprintf(value, sizeof(values[0]), "%.*s", (int)(word - length - 1), p + length + 1);
			found = value;
		}
		p += word;
		p += strspn(p, " \n");
	}
	if (found)
		used++;
	return found;
}

static void read_cmdline(void)
{
	int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? 0 : read(fd, cmdline, sizeof(cmdline) - 1);

	cmdline[n > 0 ? n : 0] = '\0';
	if (fd >= 0)
		close(fd);
}

static void open_console(bool echo)
{
	struct termios mode;

	console = open(CONSOLE, O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (console < 0)
		return;
	/* Whatever is typed at a console without a shell must not come back into the middle of a line. */
	if (!echo && tcgetattr(console, &mode) == 0) {
		mode.c_lflag &= ~(tcflag_t)(ECHO | ECHONL);
		tcsetattr(console, TCSANOW, &mode);
	}
}

/* Loads the modules in the order that the build worked out from modules.dep. */
static void load_modules(void)
{
	FILE *list = fopen(MODULE_LIST, "re");
	char path[256];

	if (!list) {
		say("edgehold-guest warning %s: %s", MODULE_LIST, strerror(errno));
		return;
	}
	while (fgets(path, sizeof(path), list)) {
		int fd;

		path[strcspn(path, "\n")] = '\0';
		fd = open(path, O_RDONLY | O_CLOEXEC);
		/* ENODEV: the driver looks for its device itself and there is none. */
		if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) != 0 && errno != EEXIST && errno != ENODEV))
			say("edgehold-guest warning module %s: %s", path, strerror(errno));
		if (fd >= 0)
			close(fd);
	}
	fclose(list);
}

static bool has_power_key(int fd)
{
	unsigned char keys[KEY_MAX / 8 + 1] = {0};

	return ioctl(fd, EVIOCGBIT(EV_KEY, sizeof(keys)), keys) >= 0 && (keys[KEY_POWER / 8] & (1 << KEY_POWER % 8));
}

/* Opens every input device with a power key; returns how many. */
static int open_buttons(struct pollfd *fds, int max)
{
	DIR *dir = opendir("/dev/input");
	struct dirent *entry;
	int count = 0;

	while (dir && count < max && (entry = readdir(dir))) {
		int fd;

		if (strncmp(entry->d_name, "event", 5) != 0)
			continue;
		fd = openat(dirfd(dir), entry->d_name, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
		if (fd < 0)
			continue;
		if (has_power_key(fd))
			fds[count++] = (struct pollfd){.fd = fd, .events = POLLIN};
		else
			close(fd);
	}
	if (dir)
		closedir(dir);
	return count;
}

/* True when the power key went down. A device that is gone is taken out of the poll set. */
static bool power_pressed(struct pollfd *button)
{
	struct input_event event;
	bool pressed = false;
	ssize_t n;

	while ((n = read(button->fd, &event, sizeof(event))) == (ssize_t)sizeof(event))
		pressed |= event.type == EV_KEY && event.code == KEY_POWER && event.value == 1;
	if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) {
		close(button->fd);
		button->fd = -1;
	}
	return pressed;
}

static _Noreturn void stop_guest(int how, const char *word)
{
	kill(-1, SIGKILL); /* first, so that no job's line comes after ours */
	say("edgehold-guest %s", word);
	tcdrain(console);
	sync();
	reboot(how);
	for (;;)
		pause();
}

/* A child with default signals, ordinary scheduling and `fd` (if any) as its standard streams. */
static pid_t spawn(const char *tty, char *const argv[])
{
	static char *const env[] = {"PATH=/bin:/sbin", "HOME=/root", "TERM=linux", "PS1=guest# ", NULL};
	pid_t pid = fork();
	sigset_t none;
	int fd = console;

	if (pid != 0)
		return pid;
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	setsid();
	if (tty) {
		fd = open(tty, O_RDWR);
		if (fd < 0)
			_exit(1);
		ioctl(fd, TIOCSCTTY, 0);
	}
	for (int i = 0; i < 3; i++)
		dup2(fd, i);
	if (fd > 2)
		close(fd);
	execve(argv[0], argv, env);
	_exit(127);
}

/* A port of virtio's console is announced before its terminal can be opened, and nothing tells when it can. */
#define RETRY_S 10
#define RETRY_MS 200
static time_t retry_until;

static void start_shell(struct shell *shell)
{
	/* The applets' links are made here and not at build time: no shell, no cost. */
	static char *const argv[] = {"/bin/busybox", "sh", "-c", "/bin/busybox --install -s /bin; cd; exec /bin/sh -i", NULL};
	int fd;

	if (!shell->tty || shell->pid > 0)
		return;
	fd = open(shell->tty, O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
	if (fd < 0) {
		shell->refused = errno != ENOENT;
		return; /* no such terminal (yet): a uevent tells when it appears */
	}
	shell->refused = 0;
	close(fd);
	shell->started = uptime_s();
	shell->pid = spawn(shell->tty, argv);
}

static void start_job(void)
{
	const char *job_ms = option("edgehold.job_ms");
	const char *period_ms = option("edgehold.period_ms");
	char work[64], period[64];
	char *const argv[] = {"/sbin/edgehold-job", work, period, NULL};

	if (!job_ms)
		return;
	snprintf(work, sizeof(work), "%s", job_ms);
	snprintf(period, sizeof(period), "%s", period_ms ? period_ms : DEFAULT_PERIOD_MS);
	job_pid = spawn(NULL, argv);
}

/* A guest that attacks its neighbours: see hog.c. */
static void start_hog(void)
{
	const char *kind = option("edgehold.hog");
	char what[64];
	char *const argv[] = {"/sbin/edgehold-hog", what, NULL};

	if (!kind)
		return;
	snprintf(what, sizeof(what), "%s", kind);
	spawn(NULL, argv);
}

static void reap(void)
{
	int status;
	pid_t pid;

	while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
		if (pid == job_pid) {
			job_pid = 0;
			say("edgehold-guest job-ended status=%d", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
		}
		for (size_t i = 0; i < sizeof(shells) / sizeof(shells[0]); i++) {
			if (pid != shells[i].pid)
				continue;
			shells[i].pid = 0;
			if (uptime_s() - shells[i].started > SHELL_MIN_S)
				start_shell(&shells[i]);
		}
	}
}

static int open_signals(void)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	sigaddset(&set, SIGUSR2); /* busybox poweroff */
	sigaddset(&set, SIGTERM); /* busybox reboot */
	sigprocmask(SIG_BLOCK, &set, NULL);
	return signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
}

static void on_signal(int fd)
{
	struct signalfd_siginfo info;

	while (read(fd, &info, sizeof(info)) == (ssize_t)sizeof(info)) {
		if (info.ssi_signo == SIGUSR2)
			stop_guest(RB_POWER_OFF, "power-off");
		if (info.ssi_signo == SIGTERM)
			stop_guest(RB_AUTOBOOT, "reboot");
	}
	reap();
}

/* The kernel's device events: a virtio console's terminal appears some time after its driver. */
static int open_uevents(void)
{
	struct sockaddr_nl address = {.nl_family = AF_NETLINK, .nl_groups = 1};
	int fd = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_KOBJECT_UEVENT);

	if (fd >= 0 && bind(fd, (struct sockaddr *)&address, sizeof(address)) != 0) {
		close(fd);
		fd = -1;
	}
	return fd;
}

static void start_shells(void)
{
	for (size_t i = 0; i < sizeof(shells) / sizeof(shells[0]); i++)
		start_shell(&shells[i]);
}

/* How long to wait for something to happen, in ms: for ever, unless a terminal may be there soon. */
static int patience_ms(void)
{
	return shells[0].refused && uptime_s() < retry_until ? RETRY_MS : -1;
}

static void on_uevent(int fd)
{
	char buffer[4096];

	while (recv(fd, buffer, sizeof(buffer), 0) >= 0)
		;
	retry_until = uptime_s() + RETRY_S;
	start_shells();
}

static int open_panic_timer(void)
{
	const char *text = option("edgehold.panic_s");
	double seconds = text ? strtod(text, NULL) : 0;
	struct itimerspec when = {.it_value = {.tv_sec = (time_t)seconds}};
	int fd;

	if (!(seconds > 0) || seconds > 1e6)
		return -1;
	when.it_value.tv_nsec = (long)((seconds - (double)when.it_value.tv_sec) * 1e9) | 1; /* zero would disarm it */
	fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
	if (fd >= 0)
		timerfd_settime(fd, 0, &when, NULL);
	return fd;
}

static void mount_all(void)
{
	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mkdir("/dev", 0755);
	mkdir("/tmp", 01777);
	mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	mount("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=0755");
	mkdir("/dev/pts", 0755);
	mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, NULL);
}

int main(void)
{
	/* Above the job, so that the button works while the job has a backlog; children start as ordinary ones. */
	const struct sched_param urgent = {.sched_priority = 1};
	struct pollfd fds[MAX_BUTTONS + 3];
	struct timespec up;
	struct utsname name;
	const char *shell;
	int buttons, signals, uevents, panic_timer;

	mount_all();
	read_cmdline();
	shell = option("edgehold.shell");
	if (shell && strcmp(shell, SERIAL) == 0)
		shells[1].tty = CONSOLE;
	open_console(shells[1].tty != NULL);
	/* From here on only a panic may write on the console: no kernel message inside a job's line. */
	write_file("/proc/sys/kernel/printk", "1 4 1 7");
	sched_setscheduler(0, SCHED_FIFO | SCHED_RESET_ON_FORK, &urgent);

	uevents = open_uevents();
	signals = open_signals();
	load_modules();
	buttons = open_buttons(fds, MAX_BUTTONS);
	if (buttons == 0)
		say("edgehold-guest warning no power button");

	uname(&name);
	clock_gettime(CLOCK_BOOTTIME, &up);
	say("edgehold-guest up kernel=%s uptime_s=%lld.%lld cpus=%ld", name.release, (long long)up.tv_sec,
	    (long long)up.tv_nsec / 100000000, sysconf(_SC_NPROCESSORS_ONLN));
	panic_timer = open_panic_timer();
	start_job();
	start_hog();
	retry_until = uptime_s() + RETRY_S;
	start_shells();

	fds[buttons] = (struct pollfd){.fd = signals, .events = POLLIN};
	fds[buttons + 1] = (struct pollfd){.fd = uevents, .events = POLLIN};
	fds[buttons + 2] = (struct pollfd){.fd = panic_timer, .events = POLLIN};
	for (;;) {
		int ready = poll(fds, (nfds_t)buttons + 3, patience_ms());

		if (ready == 0)
			start_shells();
		if (ready <= 0)
			continue;
		for (int i = 0; i < buttons; i++)
			if (fds[i].revents && power_pressed(&fds[i]))
				stop_guest(RB_POWER_OFF, "power-off");
		if (fds[buttons].revents)
			on_signal(signals);
		if (fds[buttons + 1].revents)
			on_uevent(uevents);
		if (fds[buttons + 2].revents)
			write_file("/proc/sysrq-trigger", "c");
	}
}
