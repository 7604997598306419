/* The table of held threads and the rules that size their budgets. Read by cffi and included by held.h. Times in ns. */

#define EH_WINDOW_MAX 64

#define EH_RULE_FAST 0
#define EH_RULE_REFERENCE 1
#define EH_RULE_FIXED 2

/* What a rule is given. 0 < floor <= cap <= period, overallocation > 0, 1 <= window <= EH_WINDOW_MAX. */
struct eh_rule {
    uint64_t period_ns;
    uint64_t floor_ns;
    uint64_t cap_ns;
    double overallocation;
    uint32_t window;
    uint32_t kind;
};

/* One window of one thread. budget_ns 0: nothing limits it. The last two are 1, 0 or -1 (not known). */
struct eh_window {
    uint64_t elapsed_ns;
    uint64_t executed_ns;
    uint64_t run_delay_ns;
    uint64_t budget_ns;
    int32_t throttled; /* at the window's end it had used its budget up and wanted more */
    int32_t saturated; /* known from elsewhere (a group); -1: to be judged here */
};

#define EH_PHASE_STEADY 0
#define EH_PHASE_SUSPECT 1   /* a short window is on its way, which only looks */
#define EH_PHASE_SATURATED 2 /* has much more than it had, until it has slept */
#define EH_PHASE_BEGIN 3     /* its first, short window: set by who attaches it, where there are short ones */

/* A rule's state, of one thread. */
struct eh_sizing {
    uint64_t wanted_ns;
    uint64_t multiplier;
    uint64_t largest_before_ns; /* 0 at the start: nothing had been executed when the thread was attached */
    uint32_t filled;
    uint32_t next;
    uint32_t phase;
    uint32_t looks; /* short windows in a row */
    uint32_t saturated; /* the last window was */
    uint32_t provisional; /* the only sample is the first one: the second replaces it */
    uint64_t samples_ns[EH_WINDOW_MAX];
};

/* Begins with a budget; then one step a window. Returns whether the next window should be a short one. */
void eh_rule_begin(struct eh_sizing *sizing, uint64_t budget_ns);
int eh_rule_step(const struct eh_rule *rule, struct eh_sizing *sizing, const struct eh_window *window);
/* Whether the last step can't judge without knowing whether the thread is throttled at this moment. */
int eh_rule_asks(const struct eh_rule *rule, const struct eh_sizing *sizing, const struct eh_window *window);
/* Another period: what was learned stays, in proportion. The new rule's bounds hold at once. */
void eh_rule_rescale(struct eh_sizing *sizing, const struct eh_rule *before, const struct eh_rule *after);

#define EH_HELD 1   /* in SCHED_DEADLINE by us */
#define EH_FROZEN 2 /* suspended: sampled for its end only, its rule stands still */

/* A row of the table; tid 0: free. */
struct eh_held {
    int32_t tid;
    int32_t fd; /* its schedstat; the caller's */
    uint32_t owner;
    uint32_t flags;
    uint64_t start_ticks;
    struct eh_rule rule;
    uint64_t budget_ns; /* in force; 0: none */
    uint64_t told_ns;   /* the last wanted_ns that was told */
    uint64_t executed_total_ns;
    uint64_t base_ns; /* where the window began; 0: with the next sample */
    uint64_t base_executed_ns;
    uint64_t base_run_delay_ns;
    uint64_t due_ns;      /* when a window of its own ends; 0: with the cycle */
    uint64_t executed_ns; /* of the last window, per period */
    uint64_t run_delay_ns;
    uint64_t progress_ns; /* when it was last seen to have executed */
    uint64_t look_ns;     /* when to look (again) whether it sleeps */
    uint64_t check_ns;    /* when to ask (again) whether its reservation is ours */
    uint32_t windows;
    uint32_t place; /* EH_PLACE_... */
    struct eh_sizing sizing; /* with its samples last: what a pass looks at lies close together */
};

#define EH_PLACE_CYCLE 0    /* its window began with a cycle */
#define EH_PLACE_SHORT 1    /* a short window of its own */
#define EH_PLACE_SETTLING 2 /* a long one of its own, after short ones */
#define EH_PLACE_BETWEEN 3  /* it waits for the next cycle to begin one */

/* A window that is over, for whoever wants to see it later. */
struct eh_sample {
    uint64_t time_ns;
    uint64_t elapsed_ns;
    uint64_t executed_ns;
    uint64_t run_delay_ns;
    uint64_t budget_ns;
    uint64_t wanted_ns;
    uint64_t period_ns;
    uint64_t multiplier;
    int32_t tid;
    uint32_t owner;
    uint32_t saturated;
    uint32_t reserved;
};

#define EH_TODO_CHANGE 1  /* the rule wants another budget */
#define EH_TODO_GONE 2    /* the thread ended */
#define EH_TODO_TAKEN 4   /* it is not in our reservation any more */
#define EH_TODO_LOOK 8    /* it wants to run and has not executed for two periods */
#define EH_TODO_ERROR 16  /* it could not be read; error says why */

struct eh_todo {
    int32_t row;
    uint32_t what;
    int32_t error;
    uint32_t reserved;
};

/* One pass over the table. */
struct eh_pass {
    uint64_t cycle_ns;  /* T */
    uint64_t short_ns;  /* the length of a short window, at least; 0: none */
    uint32_t grid;      /* 1: all windows end; 0: only short ones that are due */
    uint32_t task_count;
    const struct eh_task *tasks; /* every deadline thread of the host, or NULL: each row is read by its descriptor */
    uint64_t tasks_ns;           /* when the reading of `tasks` began (CLOCK_MONOTONIC) */
    int32_t *index;     /* room for index_size entries, a power of two of at least twice task_count */
    uint64_t index_size;
    struct eh_sample *history;
    uint64_t history_size;
    uint64_t history_written; /* counts for ever; the newest is at (history_written - 1) % history_size */
    uint64_t next_due_ns;     /* out: the first end of a short window; 0: none */
};

/* Samples, applies the rules and fills in what is to be done: at most one entry a row, so `todo` has room for `rows`. */
int eh_pass(struct eh_held *table, int rows, struct eh_pass *pass, struct eh_todo *todo);
/* The samples of an owner (and of one tid, unless 0), oldest first, the last `most` of them. Returns how many. */
int eh_history(const struct eh_pass *pass, uint32_t owner, int32_t tid, struct eh_sample *out, int most);
/* 'R', 'S', ... of proc_pid_stat(5), or -errno; opens and closes the file. */
int eh_thread_state(int32_t tid);
/* Whether a thread waits for its budget: 1, 0, or -1 where the kernel does not tell. */
int eh_is_throttled(int32_t tid);
