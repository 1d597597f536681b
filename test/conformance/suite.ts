import type { Test } from 'tap';
import type { Kernel } from '../../lib/kernel/kernel.ts';
import type { SoftwareKernel } from '../../lib/kernel/software/software_kernel.ts';
import { sections } from './cases/index.ts';
import { type Case, describe, type InChild, matches, type Need, resolve, Scenario } from './scenario.ts';
import type { Tally } from './tally.ts';

/** Runs every case whose needs the kernel meets: a subtest per section, an assertion per case. */
export async function conform(t: Test, name: string, kernel: Kernel, inChild: InChild): Promise<Tally> {
  const tally: Tally = { kernel: name, agree: [], disagree: [], notApplicable: {} };
  const isMet = needsOf(() => new Scenario(kernel, inChild));
  for (const { title, cases } of sections) {
    const applicable = cases.filter(({ id, needs }) => {
      const unmet = needs.find((need) => !isMet(need));
      if (unmet) tally.notApplicable[unmet.missing] = [...(tally.notApplicable[unmet.missing] ?? []), id];
      return !unmet;
    });
    if (applicable.length === 0) continue;
    await t.test(title, async (t) => {
      for (const each of applicable) {
        const difference = await judge(each, new Scenario(kernel, inChild));
        tally[difference ? 'disagree' : 'agree'].push(each.id);
        if (difference) t.fail(`${each.id}: ${each.sentence}`, { ...difference, kernel: name, at: null, stack: '' });
        else t.pass(`${each.id}: ${each.sentence}`);
      }
    });
  }
  return tally;
}

/** Whether a kernel meets a need, asked of it once. */
export function needsOf(newScenario: () => Scenario): (need: Need) => boolean {
  const answers = new Map<Need, boolean>();
  return (need) => {
    const known = answers.get(need);
    if (known !== undefined) return known;
    const s = newScenario();
    const met = need.met(s);
    s.close();
    answers.set(need, met);
    return met;
  };
}

/** Null when the kernel answers as the contract says, and everything could be given back afterwards. */
export async function judge(each: Case, s: Scenario): Promise<{ expected: string; got: string } | null> {
  try {
    const { got, expected } = await each.run(s);
    const answer = resolve(expected, s.kernel);
    const left = s.close();
    if (!matches(got, answer)) return { expected: describe(answer), got: describe(got) };
    return left.length > 0 ? { expected: 'everything closed', got: `not closed: ${left.join(', ')}` } : null;
  } catch (error) {
    s.close();
    return { expected: 'an answer', got: String(error) };
  }
}

/** The other processes of a software kernel. */
export function forked(kernel: SoftwareKernel): InChild {
  return (program, fds) => {
    const child = kernel.fork();
    const numbers = fds.map(({ fd }) => fd);
    const result = program(child, numbers);
    for (const fd of numbers) child.close(fd);
    return result;
  };
}
