/*
 * The rules that size a budget (docs/deadlined.md says them in words). Pure: numbers in, numbers out, no clock, no call.
 *
 * The reference rule is that of NANCY D3.4 §4, Figure 23. The fast rule's thresholds are measured: a thread that other
 * deadline threads or a late monitor only held up has slept in its window, and one whose budget is too small has not.
 */
#include <string.h>

#include "held.h"

/* l doubles while the need grows. From here on it changes nothing, and it must not outgrow what a double counts. */
#define MULTIPLIER_MAX ((uint64_t)1 << 40)
/* A lower budget than this part of the present one is worth a system call, a higher one sooner: it is the safe side. */
#define LOWER_BAND 0.95
#define FIRST_LOWER_BAND 0.99
#define RAISE_BAND_MAX 0.05
/* The shares of the budget from which on a thread may be short of it. */
#define SATURATED_SHARE 0.75
#define SUSPECT_SHARE 0.93
#define SUSPECT_DELAY 0.05
#define AWAKE 0.9
#define MOSTLY_AWAKE 0.6
/* A saturated thread gets so many times what it had, and the cap if that is less: a tiny one need not ask for it all. */
#define JUMP 40.0
/* More than this in a period is no measurement; thirty years. */
#define PER_PERIOD_MAX 1e18
/* A thread that is saturated with the cap in force for so many short windows is not seen sooner by looking oftener. */
#define LOOKS_MAX 10

uint64_t eh_per_period(uint64_t ns, uint64_t period_ns, uint64_t elapsed_ns)
{
    /* In double: a minute's window and a period of four seconds have a product of more than 64 bits. */
    double share = (double)ns * (double)period_ns / (double)elapsed_ns;

    return share < PER_PERIOD_MAX ? (uint64_t)share : (uint64_t)PER_PERIOD_MAX;
}

static uint64_t per_period(uint64_t ns, const struct eh_rule *rule, const struct eh_window *window)
{
    return eh_per_period(ns, rule->period_ns, window->elapsed_ns);
}

static uint64_t bounded(double wanted, const struct eh_rule *rule)
{
    if (wanted >= (double)rule->cap_ns)
        return rule->cap_ns;
    return wanted <= (double)rule->floor_ns ? rule->floor_ns : (uint64_t)(wanted + 0.5);
}

static void push(struct eh_sizing *sizing, const struct eh_rule *rule, uint64_t sample)
{
    sizing->samples_ns[sizing->next] = sample;
    sizing->next = (sizing->next + 1) % rule->window;
    if (sizing->filled < rule->window)
        sizing->filled++;
}

static uint64_t largest(const struct eh_sizing *sizing)
{
    uint64_t most = 0;

    for (uint32_t i = 0; i < sizing->filled; i++)
        if (sizing->samples_ns[i] > most)
            most = sizing->samples_ns[i];
    return most;
}

void eh_rule_begin(struct eh_sizing *sizing, uint64_t budget_ns)
{
    memset(sizing, 0, sizeof(*sizing));
    sizing->wanted_ns = budget_ns;
    sizing->multiplier = 1;
}

void eh_rule_rescale(struct eh_sizing *sizing, const struct eh_rule *before, const struct eh_rule *after)
{
    double factor = (double)after->period_ns / (double)before->period_ns;
    uint64_t kept[EH_WINDOW_MAX];
    uint32_t keep = sizing->filled < after->window ? sizing->filled : after->window;

    /* The newest first, so that a shorter window keeps what is newest. */
    for (uint32_t i = 0; i < keep; i++)
        kept[i] = sizing->samples_ns[(sizing->next + before->window - 1 - i) % before->window];
    for (uint32_t i = 0; i < keep; i++)
        sizing->samples_ns[keep - 1 - i] = (uint64_t)((double)kept[i] * factor);
    sizing->filled = keep;
    sizing->next = keep % after->window;
    sizing->largest_before_ns = (uint64_t)((double)sizing->largest_before_ns * factor);
    sizing->wanted_ns = bounded((double)sizing->wanted_ns * factor, after);
    if (after->kind != before->kind) {
        sizing->multiplier = 1;
        sizing->phase = EH_PHASE_STEADY;
        sizing->looks = 0;
    }
}

static void reference(const struct eh_rule *rule, struct eh_sizing *sizing, uint64_t executed_ns)
{
    uint64_t most;
    int grew;

    push(sizing, rule, executed_ns);
    most = largest(sizing);
    grew = most > sizing->largest_before_ns;
    sizing->multiplier = !grew ? 1 : sizing->multiplier < MULTIPLIER_MAX ? sizing->multiplier * 2 : MULTIPLIER_MAX;
    sizing->largest_before_ns = most;
    sizing->wanted_ns = bounded((double)most * (1 + rule->overallocation * (double)sizing->multiplier), rule);
}

static double wakefulness(const struct eh_window *window)
{
    return (double)(window->executed_ns + window->run_delay_ns) / (double)window->elapsed_ns;
}

/* It was awake all the time: the closer the budget is to the whole period, the less sleep there can be in it anyway. */
static int awake(const struct eh_rule *rule, const struct eh_window *window)
{
    double unused = 1 - (double)window->budget_ns / (double)rule->period_ns;

    return wakefulness(window) >= (1 - unused / 2 > AWAKE ? 1 - unused / 2 : AWAKE);
}

static int suspected(const struct eh_window *window, uint64_t executed_ns)
{
    return (double)executed_ns >= SUSPECT_SHARE * (double)window->budget_ns;
}

static int is_saturated(const struct eh_rule *rule, const struct eh_sizing *sizing, const struct eh_window *window,
                        uint64_t executed_ns)
{
    if (window->saturated >= 0)
        return window->saturated;
    if (!window->budget_ns)
        return 0;
    /* A raise is in force only from the next replenishment on, so what was executed says nothing yet. */
    if (sizing->phase == EH_PHASE_SATURATED)
        return awake(rule, window) || window->throttled == 1;
    if ((double)executed_ns < SATURATED_SHARE * (double)window->budget_ns)
        return 0;
    if (awake(rule, window))
        return 1;
    if (window->throttled != 1 || !suspected(window, executed_ns))
        return 0;
    /* How long it is throttled already is not counted yet. With a budget of a few ticks that can be most of a window, at
     * the begin all of it; but a single job that ran over is throttled at times as well. */
    return sizing->phase == EH_PHASE_BEGIN || (sizing->phase == EH_PHASE_STEADY && wakefulness(window) >= MOSTLY_AWAKE);
}

int eh_rule_asks(const struct eh_rule *rule, const struct eh_sizing *sizing, const struct eh_window *window)
{
    uint64_t executed_ns;

    if (rule->kind != EH_RULE_FAST || !window->budget_ns || !window->elapsed_ns || window->throttled >= 0 ||
        window->saturated >= 0)
        return 0;
    if (awake(rule, window) || sizing->phase == EH_PHASE_SUSPECT)
        return 0;
    executed_ns = per_period(window->executed_ns, rule, window);
    return sizing->phase == EH_PHASE_SATURATED || suspected(window, executed_ns);
}

static void follow(const struct eh_rule *rule, struct eh_sizing *sizing, uint64_t executed_ns)
{
    double raise = rule->overallocation / 4 < RAISE_BAND_MAX ? rule->overallocation / 4 : RAISE_BAND_MAX;
    double now = (double)sizing->wanted_ns, wanted;
    int second = sizing->provisional;

    /* The first window may begin and end in the middle of a job, whose time is known to a tick only; the next ones lie in
     * the cycle. So it gives a budget at once, and is not remembered beyond the second. */
    if (second)
        sizing->filled = sizing->next = 0;
    sizing->provisional = !sizing->filled && !second;
    push(sizing, rule, executed_ns);
    wanted = (double)bounded((double)largest(sizing) * (1 + rule->overallocation), rule);
    if (wanted > now * (1 + raise) || wanted < now * (second ? FIRST_LOWER_BAND : LOWER_BAND))
        sizing->wanted_ns = (uint64_t)wanted;
}

static void jump(const struct eh_rule *rule, struct eh_sizing *sizing, uint64_t budget_ns)
{
    uint64_t wanted = bounded(JUMP * (double)budget_ns, rule);

    /* Nothing limits a group whose budget is not in force yet: its own limit says nothing then. */
    if (wanted > sizing->wanted_ns || !budget_ns)
        sizing->wanted_ns = budget_ns ? wanted : rule->cap_ns;
}

static int fast(const struct eh_rule *rule, struct eh_sizing *sizing, const struct eh_window *window,
                uint64_t executed_ns)
{
    uint32_t before = sizing->phase;

    if (is_saturated(rule, sizing, window, executed_ns)) {
        sizing->saturated = 1;
        sizing->looks = before == EH_PHASE_SATURATED ? sizing->looks + 1 : 0;
        sizing->phase = EH_PHASE_SATURATED;
        sizing->filled = sizing->next = sizing->provisional = 0;
        jump(rule, sizing, window->budget_ns);
        return sizing->looks < LOOKS_MAX;
    }
    sizing->saturated = 0;
    sizing->phase = EH_PHASE_STEADY;
    /* The first window after a saturation has the backlog's end in it, a short look is too short to size by. */
    if (before != EH_PHASE_STEADY)
        return 0;
    follow(rule, sizing, executed_ns);
    if (window->budget_ns && suspected(window, executed_ns) &&
        (window->throttled == 1 || (double)window->run_delay_ns > SUSPECT_DELAY * (double)window->elapsed_ns)) {
        sizing->phase = EH_PHASE_SUSPECT;
        return 1;
    }
    return 0;
}

int eh_rule_step(const struct eh_rule *rule, struct eh_sizing *sizing, const struct eh_window *window)
{
    uint64_t executed_ns;

    if (!window->elapsed_ns)
        return 0;
    executed_ns = per_period(window->executed_ns, rule, window);
    if (rule->kind == EH_RULE_FAST)
        return fast(rule, sizing, window, executed_ns);
    sizing->saturated = (uint32_t)is_saturated(rule, sizing, window, executed_ns);
    if (rule->kind == EH_RULE_REFERENCE)
        reference(rule, sizing, executed_ns);
    return 0;
}
