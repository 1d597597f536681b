import { i32, u64 } from '../arguments.ts';
import type { Result, U64 } from '../kernel.ts';
import { linkRules } from '../rules/link.ts';
import { GrantCalls } from './grant_calls.ts';
import type { SoftwareGuestMemfd } from './software_files.ts';

/** The proposed call that lets a second VM have the pages of a guest_memfd. */
export abstract class LinkCalls extends GrantCalls {
  linkGuestMemfd(vm: number, args: { fd: number; flags: U64 }): Result {
    const [fd, flags] = [i32('fd', args.fd), u64('flags', args.flags)];
    const owner = this.vm(vm);
    if (typeof owner === 'number') return owner;
    const file = this.file(fd);
    return (
      this.check(linkRules, owner, { flags, file }) ?? this.install(() => (file as SoftwareGuestMemfd).linked(owner))
    );
  }
}
