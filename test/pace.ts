/** What a machine of test/machines changes: everything is slow there, and its host has run the software kernel. */

export const onSoftware = process.env.GUEST_MEMFD_TEST_BACKENDS !== 'kvm';
/** For a process that starts with an environment of its own. */
export const paceVariable = onSoftware ? [] : ['GUEST_MEMFD_TEST_BACKENDS=kvm'];
/** Of a limit that only what hangs exceeds. */
export const patience = onSoftware ? 1 : 10;

/** How often to do what has to hold however often it is done. */
export const times = (count: number, by = 10): number => (onSoftware ? count : Math.ceil(count / by));
/** Of many combinations, those that are tried. */
export const some = <T>(all: readonly T[], every = 10): readonly T[] =>
  onSoftware ? all : all.filter((_, index) => index % every === 0);
