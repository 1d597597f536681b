import { KvmError } from '../errors.ts';
import type { HostMemory } from '../host_memory.ts';
import { ERRNO } from '../uapi.ts';
import type { Vm } from '../vm.ts';

/**
 * Nothing of a VM's memory comes, goes or changes sides, and no vCPU runs, until it is thawed: `EPERM`.
 *
 * @returns what thaws it; a second call does nothing.
 * @throws KvmError `EBUSY` a vCPU runs or a conversion is at work · `EPERM` it is frozen already
 */
export function freeze(vm: Vm, why: string): () => void {
  const { backing } = vm;
  vm.assertThawed();
  if (backing.runs.count > 0)
    throw new KvmError({ code: 'EBUSY', errno: -ERRNO.EBUSY, message: 'a vCPU of the VM runs: stop it first (EBUSY)' });
  backing.assertIdle(0, Number.MAX_SAFE_INTEGER);
  const memories = new Set<HostMemory>([...vm.memslots.values()].flatMap(({ hostMemory }) => hostMemory ?? []));
  const set = (reason: string | null): void => {
    backing.freeze(reason);
    for (const memory of memories) memory.backing.freeze(reason);
  };
  set(why);
  let frozen = true;
  return () => {
    if (frozen) set(null);
    frozen = false;
  };
}
