import { ERRNO, type ErrnoName } from '../../uapi.ts';

/**
 * A check of the kernel: its errno, its name, and the sentence a user reads when it is broken. The rules of a call stand in the kernel's
 * order, so the first one that is broken decides the answer. Nothing else in the project decides an errno of KVM.
 */
export interface Rule<S, R> {
  readonly errno: ErrnoName | ((subject: S, request: R) => ErrnoName);
  readonly name: string;
  /** A sentence when the rule is broken, something falsy when it is not. */
  readonly broken: (subject: S, request: R) => string | false | 0 | null | undefined;
}

export interface Violation {
  /** Positive. */
  readonly errno: number;
  readonly rule: string;
  readonly sentence: string;
}

export function rule<S, R>(errno: Rule<S, R>['errno'], name: string, broken: Rule<S, R>['broken']): Rule<S, R> {
  return { errno, name, broken };
}

export function check<S, R>(rules: readonly Rule<S, R>[], subject: S, request: R): Violation | null {
  for (const { errno, name, broken } of rules) {
    const sentence = broken(subject, request);
    if (sentence)
      return { errno: ERRNO[typeof errno === 'string' ? errno : errno(subject, request)], rule: name, sentence };
  }
  return null;
}

/** The broken rule that gives this errno: why a real kernel may have answered so. */
export function explain<S, R>(rules: readonly Rule<S, R>[], subject: S, request: R, errno: number): Violation | null {
  for (const one of rules) {
    // A rule of another errno may rely on those before it, which the kernel has checked and we have not.
    if (typeof one.errno === 'string' && ERRNO[one.errno] !== errno) continue;
    const violation = check([one], subject, request);
    if (violation?.errno === errno) return violation;
  }
  return null;
}
